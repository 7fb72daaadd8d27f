"""The importance loss: experts get equal sums of combine weights."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.losses.share import share


class ImportanceLoss(nn.Module):
    r""":math:`\mathrm{CV}^2(I)` of one layer, :math:`I_i = \sum_t g_{t,i}`
    (Shazeer et al., arXiv 1701.06538, equations 6-7).

    g are the sparse combine weights, so an expert that nobody picks adds nothing to I and gets no
    gradient; with a capacity they are the kept ones. Padding has none. 0 when all experts count
    alike, E - 1 when one has it all. The sums run over the whole optimizer step.
    """

    needs_step_sums = True

    def __init__(self, weight: float = 0.01) -> None:
        super().__init__()
        within("weight", weight, 0)
        self.weight = weight

    def step_sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> Float[Tensor, "E"]:
        """Summed combine weights of each expert."""
        weights = output.combine_weights
        return weights.new_zeros(output.num_experts).index_add(0, output.expert_indices, weights)

    def forward(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """This record's share of the step's loss; without ``totals``, the loss of the record."""
        return share(cv_squared, self.step_sums(output, context), totals, output, context)


def cv_squared(values: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    """The squared coefficient of variation: the variance over E (not E - 1), over the mean squared
    plus 1e-10.
    """
    return torch.var(values, correction=0) / (values.mean().square() + 1e-10)
