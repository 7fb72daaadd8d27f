"""Sinkhorn routing: picks and weights from the optimal transport plan of the batch."""

from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import choice, within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.sinkhorn import sinkhorn_bias
from routerlab.routers.gate import Gate, full_precision


class Sinkhorn(nn.Module):
    r"""In training the top-k of a balanced plan, in evaluation that of a softmax.

    Training: :math:`\Pi` maximises :math:`\langle\Pi, C\rangle - \xi\langle\Pi, \log\Pi\rangle`
    over rows that sum to 1 and columns that sum to T/E, where the compatibility C is ``z`` or
    ``softmax(z)`` of the logits z and T counts the valid tokens of the micro-batch. Evaluation:
    :math:`\Pi = \mathrm{softmax}(z)`, each token on its own. Either way :math:`S_t` holds the K
    largest of :math:`\Pi_t`, and the weights are :math:`\Pi_{t,j} / \sum_{S_t}\Pi_t`: the row
    projected on its K largest entries in the KL sense (Nguyen et al., arXiv 2511.08972). For K = 1
    that is always 1 and would teach the router nothing, so the weight is :math:`\Pi_{t,j}`
    [reconstructed].

    The plan is :math:`\mathrm{softmax}_E(C/\xi + \log v)`: a softmax router of temperature xi with
    an expert bias of the batch (`ops.sinkhorn`). It balances soft mass; at large xi its argmax can
    still be uneven. ``router_probs`` is :math:`\Pi`.

    Args:
        d_model: D.
        num_experts: E.
        top_k: K.
        cost: C: ``logits`` or ``softmax``. What xi means depends on it: a softmax lies in [0, 1].
        xi: the entropy weight.
        max_iter: the most Sinkhorn iterations.
        tol: they stop when the 2-norm of (column sums - T/E) is below; 0 never stops early.
        ot_grad: how weights depend on C in training [reconstructed]: ``envelope`` with
            :math:`\log v` as a constant, ``unroll`` also through the iterations, ``none`` not at
            all (the router then learns nothing from the plan).
        init_std: standard deviation of the gate's initial weights.
    """

    causal = True

    @property
    def causal_training(self) -> bool:
        """False: the plan sees all tokens of the micro-batch."""
        return False

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        cost: str = "logits",
        xi: float = 1.0,
        max_iter: int = 100,
        tol: float = 1e-4,
        ot_grad: str = "envelope",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        within("top_k", top_k, 1, num_experts)
        choice("cost", cost, ("logits", "softmax"))
        within("xi", xi, 0, above=True)
        within("max_iter", max_iter, 1)
        within("tol", tol, 0)
        choice("ot_grad", ot_grad, ("envelope", "none", "unroll"))
        self.num_experts, self.top_k = num_experts, top_k
        self.cost, self.xi, self.max_iter, self.tol = cost, xi, max_iter, tol
        self.ot_grad = ot_grad
        self.gate = Gate(d_model, num_experts, init_std)

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of K picks a token; padding is in no plan and picks nothing."""
        logits = self.gate(x)
        with full_precision(x):
            ranked = self._training_scores(logits, context) if self.training else logits
            experts = ranked.detach().topk(self.top_k, dim=-1).indices
            probs = ranked.softmax(-1)
            weights = probs.gather(-1, experts)
            if self.top_k > 1:
                weights = weights / weights.sum(-1, keepdim=True)
        valid = None if context is None else context.valid
        return RouterOutput.from_top_k(logits, probs, experts, weights, valid=valid)

    def _training_scores(self, logits: Tensor, context: RoutingContext | None) -> Tensor:
        """Scores whose softmax is the distribution that experts are picked from."""
        return self._plan_scores(self._compatibility(logits), context)

    def _compatibility(self, logits: Tensor) -> Tensor:
        return logits if self.cost == "logits" else logits.softmax(-1)

    def _plan_scores(self, compatibility: Tensor, context: RoutingContext | None) -> Tensor:
        """C/xi + log v."""
        scores = compatibility / self.xi
        if self.ot_grad == "none":
            scores = scores.detach()
        solved = scores if self.ot_grad == "unroll" else scores.detach()
        if context is not None and context.valid is not None:
            solved = solved[context.valid]
        solved = solved - solved.amax(-1, keepdim=True)  # cancels, and need not be iterated away
        return scores + sinkhorn_bias(solved, self.max_iter, self.tol)
