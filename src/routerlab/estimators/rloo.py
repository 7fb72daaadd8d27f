"""REINFORCE with a leave-one-out baseline, for M sampled choices of the same input."""

from jaxtyping import Float
from torch import Tensor


def rloo_advantages(losses: Float[Tensor, "M *rest"]) -> Float[Tensor, "M *rest"]:
    r""":math:`(\ell_m - \bar\ell) / (M - 1)`, detached; the M samples are on the first axis.

    It is :math:`\frac{1}{M}` times the difference of a sample's loss from the mean of the other
    samples' (Kool et al., 2019; Qiu et al., arXiv 2603.10160). The remaining axes are
    inputs, or inputs and positions: each has its own baseline. ``ValueError`` for M < 2.
    """
    num_samples = losses.shape[0]
    if num_samples < 2:
        raise ValueError(
            f"losses of {num_samples} sample: a leave-one-out baseline needs at least 2"
        )
    losses = losses.detach()
    losses = losses - losses[:1]  # a mean of equal numbers can round apart from them
    return (losses - losses.mean(0)) / (num_samples - 1)


def rloo_surrogate(
    log_probs: Float[Tensor, "M *rest"], losses: Float[Tensor, "M *rest"]
) -> Float[Tensor, "*rest"]:
    r"""The sum over samples of advantage times log-probability: to be *minimised*, its gradient is
    an unbiased estimate of that of :math:`E[\ell]`. Its value means nothing.

    ``log_probs`` are sums over layers, and over the tokens that share a loss: a mean would
    weigh inputs by their length.
    """
    return (rloo_advantages(losses) * log_probs).sum(0)


def reward_to_go(token_losses: Float[Tensor, "*batch S"]) -> Float[Tensor, "*batch S"]:
    """The sum of the losses at and after each position [reconstructed].

    Where attention is causal a choice at a position touches no earlier loss, so these sums can
    stand for the loss of the whole sequence, position by position: still unbiased, less variance.
    """
    return token_losses.flip(-1).cumsum(-1).flip(-1)
