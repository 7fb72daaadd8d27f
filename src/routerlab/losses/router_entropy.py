"""The mean entropy of single tokens' router distributions: how unsure the router is."""

import math

from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.ops.entropy import entropy


class RouterEntropyLoss(nn.Module):
    r""":math:`\frac{1}{T} \sum_t H(p_t)` of one layer, :math:`H(p) = -\sum_i p_i \ln p_i` of the
    full ``router_probs``; padding excluded.

    A positive weight sharpens the router, a negative one flattens it. Neither balances experts:
    the entropy of single tokens is low both for a specialised and for a collapsed router.

    Args:
        weight: of the loss, of any sign.
        normalize: divide by :math:`\ln E`, so that 1 is uniform.
    """

    needs_step_sums = False

    def __init__(self, weight: float = 0.01, normalize: bool = True) -> None:
        super().__init__()
        within("weight", weight)
        self.weight, self.normalize = weight, normalize

    def forward(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """This record's share of the step's loss; without ``totals``, the loss of the record."""
        totals = StepTotals.of(output, context) if totals is None else totals
        mean = entropy(output.without_padding(output.router_probs)).sum() / totals.num_tokens
        return mean / math.log(max(output.num_experts, 2)) if self.normalize else mean
