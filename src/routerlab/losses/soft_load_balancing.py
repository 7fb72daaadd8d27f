"""DynMoLE's load-balancing loss: shares of weight instead of counts of picks."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.losses.share import share


class SoftLoadBalancingLoss(nn.Module):
    r""":math:`E \sum_i f_i P_i` with soft f (Li et al., DynMoLE, arXiv 2504.00661, its reference
    code).

    :math:`f_i` is the mean over tokens of expert i's combine weight, 0 where it is not active, and
    :math:`P_i` the mean of its ``router_probs``. Both carry gradient (in `LoadBalancingLoss` f is
    a count without). The value is 1 for a uniform router that uses all experts, for any K with
    weights that sum to 1 and equal loads, and E when one expert has everything; weights that sum
    to less than 1 lower it. Padding is in neither.

    f and P are taken over the whole optimizer step: all its micro-batches and ranks, and with
    ``pool_layers``, as the reference does, all layers together. Experts of the same number in
    different layers then share one f, so that every single layer may be unbalanced at a value
    of 1; False takes the mean over layers of each layer's loss.

    Args:
        weight: of the loss.
        pool_layers: whether layers are one record, not one loss each.
    """

    needs_step_sums = True

    def __init__(self, weight: float = 0.001, pool_layers: bool = True) -> None:
        super().__init__()
        within("weight", weight, 0)
        self.weight, self.pool_layers = weight, pool_layers

    def step_sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> Float[Tensor, "P"]:
        """Summed combine weights of each expert, then its summed probabilities: [2 E]."""
        weights = output.combine_weights
        used = weights.new_zeros(output.num_experts).index_add(0, output.expert_indices, weights)
        return torch.cat([used, output.without_padding(output.router_probs).sum(0)])

    def forward(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """This record's share of the step's loss; without ``totals``, the loss of the record."""
        whole = StepTotals.of(output, context) if totals is None else totals

        def value(sums: Tensor) -> Tensor:
            used, probs = (sums / whole.num_tokens).chunk(2)
            return output.num_experts * (used * probs).sum()

        return share(value, self.step_sums(output, context), totals, output, context)
