"""The load loss: experts expect equal numbers of tokens, in a form with a gradient."""

from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.losses.importance import cv_squared
from routerlab.losses.share import share


class LoadCVLoss(nn.Module):
    r""":math:`\mathrm{CV}^2` of the smooth load :math:`\sum_t P_{t,i}` of one layer
    (Shazeer et al., arXiv 1701.06538, equations 8-11).

    :math:`P_{t,i}` is the record's ``selection_probs``: the chance that fresh noise on its own
    logit puts expert i among the K of token t. Only routers with noise have it. Padding is
    excluded; the sums run over the whole optimizer step.

    Raises:
        ValueError: the record has no ``selection_probs``.
    """

    needs_step_sums = True

    def __init__(self, weight: float = 0.01) -> None:
        super().__init__()
        within("weight", weight, 0)
        self.weight = weight

    def step_sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> Float[Tensor, "E"]:
        """The smooth load of each expert."""
        if output.selection_probs is None:
            raise ValueError(
                "load_cv needs selection_probs, which the router's record does not have: use "
                "router=noisy_top_k (or another router with noise on its selection)"
            )
        return output.without_padding(output.selection_probs).sum(0)

    def forward(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """This record's share of the step's loss; without ``totals``, the loss of the record."""
        return share(cv_squared, self.step_sums(output, context), totals, output, context)
