"""Token choice: every token picks its K best experts."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.capacity import expert_capacity, within_capacity


class TokenChoice(nn.Module):
    r"""Each token's K highest-scoring experts, weighted by their scores.

    With logits :math:`z = x W^T`, scores :math:`s = \mathrm{softmax}(z)` or
    :math:`\sigma(z)` and :math:`S_t` the K largest scores of token t, the combine weights are

    - ``normalize_weights=False``: :math:`g = s_{S}` (Switch, arXiv 2101.03961; OLMoE 2409.02060;
      DeepSeekMoE 2401.06066); the gradient reaches all E logits through the softmax;
    - ``normalize_weights=True``: :math:`g = s_S / \sum_{S} s` (Mixtral 2401.04088; with sigmoid
      DeepSeek-V3 2412.19437);
    - ``order="top_k_first"``: softmax over the K picked logits (Shazeer 1701.06538), which equals
      softmax, top-k, renormalise in values and gradients;

    times ``route_scale``. The router learns through ``g`` alone: the choice has no gradient.

    Args:
        d_model: D, width of the tokens.
        num_experts: E.
        top_k: K, from 1 to E. K = 1 with weights that sum to 1 is refused: the one weight would
            always be 1 and the router would get no gradient.
        score_fn: ``softmax`` or ``sigmoid``.
        order: ``score_first`` (scores, then top-k) or ``top_k_first`` (softmax only).
        normalize_weights: divide the K weights by their sum.
        route_scale: constant factor on the weights (2.5 in DeepSeek-V3).
        jitter_eps: in training, the router (and only the router) sees ``x * U(1-eps, 1+eps)``.
        capacity_factor: ``None`` is dropless; else an expert takes ``ceil(factor*T*K/E)`` picks,
            all first choices before any second, and the rest contribute nothing. With K > 1 a
            token's second choice then depends on later tokens, so the router is not ``causal``.
        init_std: standard deviation of the gate's initial weights.
    """

    causal: bool

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        score_fn: str = "softmax",
        order: str = "score_first",
        normalize_weights: bool = True,
        route_scale: float = 1.0,
        jitter_eps: float = 0.0,
        capacity_factor: float | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k}: must be from 1 to num_experts={num_experts}")
        if score_fn not in ("softmax", "sigmoid"):
            raise ValueError(f"score_fn={score_fn!r}: must be 'softmax' or 'sigmoid'")
        if order not in ("score_first", "top_k_first"):
            raise ValueError(f"order={order!r}: must be 'score_first' or 'top_k_first'")
        if order == "top_k_first" and (score_fn != "softmax" or not normalize_weights):
            raise ValueError(
                "order='top_k_first' is a softmax over the picked logits: it needs "
                f"score_fn='softmax' (got {score_fn!r}) and its weights always sum to 1, so "
                f"normalize_weights must be true (got {normalize_weights})"
            )
        if top_k == 1 and normalize_weights:
            raise ValueError(
                "top_k=1 with normalize_weights=true: the weight is always 1, so the router gets "
                "no gradient; set normalize_weights=false"
            )
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(
                f"capacity_factor={capacity_factor}: must be above 0, or null for dropless"
            )
        if not 0 <= jitter_eps < 1:
            raise ValueError(f"jitter_eps={jitter_eps}: must be from 0 to below 1")
        if route_scale <= 0:
            raise ValueError(f"route_scale={route_scale}: must be above 0")
        if init_std < 0:
            raise ValueError(f"init_std={init_std}: must be 0 or more")
        self.num_experts, self.top_k = num_experts, top_k
        self.score_fn, self.order, self.normalize_weights = score_fn, order, normalize_weights
        self.route_scale, self.jitter_eps = route_scale, jitter_eps
        self.capacity_factor = capacity_factor
        self.causal = capacity_factor is None or top_k == 1
        self.gate = nn.Linear(d_model, num_experts, bias=False)
        nn.init.normal_(self.gate.weight, std=init_std)

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of K picks a token; the padding of ``context.valid`` picks nothing."""
        valid = None if context is None else context.valid
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # the cast alone would not help
            logits = self._jitter(x.to(dtype), context) @ self.gate.weight.to(dtype).T
            scores = logits.softmax(-1) if self.score_fn == "softmax" else logits.sigmoid()
            probs = scores
            if self.score_fn == "sigmoid":  # scores over their sum, also where all scores underflow
                probs = F.logsigmoid(logits).softmax(-1)
            experts, weights = self._pick(logits, scores)
        kept = None
        if self.capacity_factor is not None:
            num_tokens = len(x) if valid is None else int(valid.sum())
            slots = expert_capacity(self.capacity_factor, num_tokens, self.top_k, self.num_experts)
            kept = within_capacity(experts, slots, valid)
        return RouterOutput.from_top_k(logits, probs, experts, weights, kept=kept, valid=valid)

    def _pick(self, logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        experts = logits.topk(self.top_k, dim=-1).indices  # scores saturate, and tie where they do
        if self.order == "top_k_first":
            weights = logits.gather(-1, experts).softmax(-1)
        else:
            weights = scores.gather(-1, experts)
            if self.normalize_weights:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * self.route_scale

    def _jitter(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        if not (self.training and self.jitter_eps):
            return x
        if context is None:
            raise ValueError("jitter_eps > 0 draws from context.seed: pass a RoutingContext")
        noise = torch.rand(x.shape, generator=context.generator(x.device), device=x.device)
        return x * (1 + self.jitter_eps * (2 * noise - 1))
