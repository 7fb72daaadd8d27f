"""LoRA-Mixer's routing specialization loss: balance over all tokens, and entropy of single ones."""

from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import choice, within
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals, count_experts
from routerlab.ops.entropy import entropy


class RoutingSpecializationLoss(nn.Module):
    r""":math:`\alpha \sum_i \bar p_i \bar f_i + s \lambda\, E[H(p)]` of one layer (Li et al.,
    LoRA-Mixer, arXiv 2507.00029, equation 5).

    :math:`\bar p` is the mean of ``router_probs`` p and :math:`\bar f` the share of tokens that
    prefer an expert, without gradient, both over the whole optimizer step; H is in nats. There is
    no factor E: the first sum is 1/E at balance, so alpha is not comparable with the weight of
    `LoadBalancingLoss`. Padding is excluded.

    The sign s is a choice. The paper prints -1, which *raises* the entropy of single tokens when
    minimised (a uniform router is then preferred to balanced one-hot choices); its text claims the
    opposite, sharper and more specialised routing, which is +1.

    Args:
        weight: of the sum of both terms.
        alpha: of the balance term [reconstructed].
        entropy_weight: lambda [reconstructed].
        entropy_sign: s, -1 as printed or 1 as intended.
        f_mode: ``top1``, each token's most probable expert [reconstructed], or ``topk``, the share
            among its first ``top_k`` ones.
        top_k: k of ``topk``; not used by ``top1``.

    Raises:
        ValueError: ``topk`` with more picks than experts.
    """

    needs_step_sums = True

    def __init__(
        self,
        weight: float = 1.0,
        alpha: float = 0.01,
        entropy_weight: float = 0.01,
        entropy_sign: int = -1,
        f_mode: str = "top1",
        top_k: int = 3,
    ) -> None:
        super().__init__()
        within("weight", weight, 0)
        within("alpha", alpha, 0)
        within("entropy_weight", entropy_weight, 0)
        choice("entropy_sign", entropy_sign, (-1, 1))
        choice("f_mode", f_mode, ("top1", "topk"))
        within("top_k", top_k, 1)
        self.weight, self.alpha, self.entropy_weight = weight, alpha, entropy_weight
        self.entropy_sign, self.f_mode, self.top_k = entropy_sign, f_mode, top_k

    def step_sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> Float[Tensor, "E"]:
        """Tokens that prefer each expert."""
        picks = 1 if self.f_mode == "top1" else self.top_k
        within("top_k", picks, 1, output.num_experts)
        probs = output.without_padding(output.router_probs)
        preferred = probs.topk(picks, dim=-1).indices.flatten()
        return count_experts(preferred, output.num_experts).to(probs.dtype)

    def forward(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """This record's share of the step's loss; without ``totals``, the loss of the record."""
        if totals is None:
            totals = StepTotals.of(output, context, self.step_sums(output, context))
        if totals.sums is None:
            raise ValueError("this loss needs totals.sums: the step's tokens by preferred expert")
        load = totals.sums / totals.sums.sum().clamp(min=1)
        probs = output.without_padding(output.router_probs)
        balance = (load * probs.sum(0)).sum() / totals.num_tokens
        unsure = entropy(probs).sum() / totals.num_tokens
        return self.alpha * balance + self.entropy_sign * self.entropy_weight * unsure
