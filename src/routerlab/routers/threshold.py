"""Threshold routing: all experts above a fixed probability."""

from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.selection import above_threshold, softmax_over
from routerlab.routers.gate import Gate, full_precision


class Threshold(nn.Module):
    r"""The experts with :math:`p_i > c / E`, where :math:`p = \mathrm{softmax}(x W^T)`, and the
    best one where there is none. At c = 1: all that the router prefers to a uniform choice.

    The chosen experts have weights :math:`p_i`, or :math:`p_i` over their sum with
    ``normalize_weights``; a token with one expert then has the weight 1, without gradient.

    Args:
        d_model: D, width of the tokens.
        num_experts: E.
        factor: c, above 0. From E on only the best expert is left.
        normalize_weights: divide the weights by their sum.
        init_std: standard deviation of the gate's initial weights.
    """

    causal = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        factor: float = 1.0,
        normalize_weights: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        within("factor", factor, 0, above=True)
        self.num_experts, self.factor = num_experts, factor
        self.normalize_weights = normalize_weights
        self.gate = Gate(d_model, num_experts, init_std)

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of any number of picks a token, at least one."""
        valid = None if context is None else context.valid
        with full_precision(x):
            logits = self.gate(x)
            probs = logits.softmax(-1)
            mask = above_threshold(probs.detach(), self.factor / self.num_experts)
            weights = softmax_over(logits, mask) if self.normalize_weights else probs
        return RouterOutput.from_dispatch_mask(logits, probs, mask, weights, valid=valid)
