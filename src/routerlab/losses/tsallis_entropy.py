"""DynMoLE's entropy loss: the mean normalised Tsallis entropy of single tokens."""

from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.ops.entropy import tsallis_entropy


class TsallisEntropyLoss(nn.Module):
    r"""The mean over tokens of :math:`S_q(p) / S_q^{max}` of one layer (Li et al., DynMoLE, arXiv
    2504.00661 and its reference code), p the full ``router_probs``:

    .. math:: S_q(p) = \frac{1 - \sum_i (p_i + \epsilon)^q}{q - 1}, \quad
              S_q^{max} = \frac{1 - E^{1-q}}{q - 1},

    and at q = 1 Shannon's entropy over :math:`\ln E`. About 1 when uniform and 0 when certain
    (slightly below, as :math:`\epsilon` is added without renormalising). Larger q weighs the
    leading experts, smaller q the tail. A positive weight sharpens the router and alone drives it
    to few experts: use it with a balance loss. Padding is excluded (the reference averages it in).

    Args:
        weight: of the loss, of any sign (negative flattens).
        entropic_index: q, above 0; within 0.01 of 1 it is taken as 1, Shannon's.
        eps: :math:`\epsilon`.
    """

    needs_step_sums = False

    def __init__(
        self, weight: float = 0.01, entropic_index: float = 1.1, eps: float = 1e-5
    ) -> None:
        super().__init__()
        within("weight", weight)
        within("entropic_index", entropic_index, 0, above=True)
        within("eps", eps, 0)
        self.weight, self.entropic_index, self.eps = weight, entropic_index, eps

    def forward(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """This record's share of the step's loss; without ``totals``, the loss of the record."""
        totals = StepTotals.of(output, context) if totals is None else totals
        probs = output.without_padding(output.router_probs)
        values = tsallis_entropy(probs, self.entropic_index, self.eps)
        return values.sum() / totals.num_tokens
