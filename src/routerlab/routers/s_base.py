"""S-BASE: picks from a Sinkhorn plan, weights from the router's own scores."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.sinkhorn import sinkhorn_bias
from routerlab.routers.gate import Gate, full_precision


class SBase(nn.Module):
    r"""S-BASE (Clark et al., arXiv 2202.01169) as in Megatron-LM's ``sinkhorn`` router.

    Training: the K largest of each row of the plan with kernel :math:`e^z` and even rows and
    columns, found without gradient. The weights are :math:`\sigma(z)` (K = 1) or
    :math:`\mathrm{softmax}(z)` over all E experts (K > 1) at those places, not renormalised, and
    carry the gradient. Evaluation: the top-k of z, each token on its own.

    The iterations are Megatron's (rows first, end on columns, until the mean change of v is below
    ``tol``) with two differences: they are capped, and instead of its 1e-8 in denominators they
    run where nothing under- or overflows.

    Args:
        d_model: D.
        num_experts: E.
        top_k: K.
        max_iter: the most iterations (Megatron has no limit).
        tol: on the mean :math:`|\Delta v|`; 0 never stops early.
        init_std: standard deviation of the gate's initial weights.
    """

    causal = True
    causal_training = False

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        max_iter: int = 100,
        tol: float = 1e-4,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        within("top_k", top_k, 1, num_experts)
        within("max_iter", max_iter, 1)
        within("tol", tol, 0)
        self.num_experts, self.top_k = num_experts, top_k
        self.max_iter, self.tol = max_iter, tol
        self.gate = Gate(d_model, num_experts, init_std)

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of K picks a token; padding is in no plan and picks nothing."""
        valid = None if context is None else context.valid
        logits = self.gate(x)
        with full_precision(x):
            if self.top_k == 1:
                scores, probs = logits.sigmoid(), F.logsigmoid(logits).softmax(-1)
            else:
                scores = probs = logits.softmax(-1)
            ranked = logits.detach()
            if self.training:
                real = ranked if valid is None else ranked[valid]
                rows = real.log_softmax(-1)  # rows first
                ranked = ranked + sinkhorn_bias(rows, self.max_iter, self.tol, stop="change")
            experts = ranked.topk(self.top_k, dim=-1).indices
            weights = scores.gather(-1, experts)
        return RouterOutput.from_top_k(logits, probs, experts, weights, valid=valid)
