"""The router z-loss: keeps router logits small."""

from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals


class RouterZLoss(nn.Module):
    r""":math:`\frac{1}{T} \sum_t (\log \sum_i e^{z_{t,i}})^2` of one layer
    (Zoph et al., ST-MoE, arXiv 2202.08906, equation 5); :math:`(\ln E)^2` at zero logits.

    Taken on the raw logits that routing uses, padding excluded. Not shift-invariant, on purpose.
    """

    needs_step_sums = False

    def __init__(self, weight: float = 1e-3) -> None:
        super().__init__()
        within("weight", weight, 0)
        self.weight = weight

    def forward(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """This record's share of the step's loss; without ``totals``, the loss of the record."""
        totals = StepTotals.of(output, context) if totals is None else totals
        squares = output.without_padding(output.router_logits).logsumexp(-1).square()
        return squares.sum() / totals.num_tokens
