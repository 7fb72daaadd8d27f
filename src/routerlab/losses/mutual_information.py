"""The mutual-information loss: a router that is sure of single tokens and even over all."""

from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.losses.share import share
from routerlab.ops.entropy import entropy


class MutualInformationLoss(nn.Module):
    r""":math:`-I(t; i) = \frac{1}{T} \sum_t H(p_t) - H\left(\frac{1}{T} \sum_t p_t\right)` of one
    layer, in nats (Shen et al., ModuleFormer, arXiv 2306.04640, the load-balancing loss).

    The negative mutual information of token and expert: minimising it makes every p confident and
    their mean uniform. From 0 (all tokens alike) down to :math:`-\ln E` (certain and balanced).
    p is the full ``router_probs``; the mean is that of the whole optimizer step, padding excluded.
    """

    needs_step_sums = True

    def __init__(self, weight: float = 0.01) -> None:
        super().__init__()
        within("weight", weight, 0)
        self.weight = weight

    def step_sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> Float[Tensor, "E"]:
        """Summed probabilities of each expert."""
        return output.without_padding(output.router_probs).sum(0)

    def forward(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """This record's share of the step's loss; without ``totals``, the loss of the record."""
        num_tokens = (StepTotals.of(output, context) if totals is None else totals).num_tokens
        mean_entropy = entropy(output.without_padding(output.router_probs)).sum() / num_tokens
        own = self.step_sums(output, context)
        of_mean = share(lambda sums: entropy(sums / num_tokens), own, totals, output, context)
        return mean_entropy - of_mean
