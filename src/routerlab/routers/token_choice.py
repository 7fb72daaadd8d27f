"""Token choice: every token picks its K best experts."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.core.checks import choice, within
from routerlab.core.protocols import Balancer
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.capacity import (
    expert_capacity,
    queue_by_priority,
    queue_by_weight,
    within_capacity,
)
from routerlab.ops.groups import limit_to_groups
from routerlab.ops.noise import noisy_logits, selection_probability
from routerlab.routers.gate import Gate, full_precision


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
    Evaluation draws nothing: no jitter, no noise, and second choices are always used.

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
        noise: in training, Gaussian noise of a learned size on the logits (Shazeer, equation 4);
            needs ``order="top_k_first"``. The record then holds ``selection_probs``.
        num_groups, groups_per_token: only experts of each token's best groups can be picked
            (DeepSeek-V3); 1 and 1 do not limit.
        second_choice_threshold: in training, a choice after the first with normalised weight g is
            used with probability ``min(1, g / threshold)`` (0.2 in mesh-TensorFlow and ST-MoE
            2202.08906, 0.5 in GShard 2006.16668); null uses all.
        capacity_factor: in training, an expert takes ``ceil(factor*T*K/E)`` picks of the
            micro-batch, and the rest contribute nothing; null is dropless.
        eval_capacity_factor: the same in evaluation.
        min_capacity: the least number of slots, where there is a capacity.
        drop_policy: who gets the slots: ``position`` (all first choices before any second, left to
            right), ``batch_priority`` (the same with tokens of high top-1 score first, arXiv
            2106.05974) or ``probability`` (the picks of the highest weight, as in Megatron).
        init_std: standard deviation of the gate's initial weights.
        balancer: a callable ``(num_experts=) -> Balancer`` whose bias is added to the scores for
            the choice, and only there.

    Slots that depend on later tokens (K > 1, or a policy other than ``position``) make the router
    not ``causal`` in the mode that has a capacity.
    """

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
        noise: bool = False,
        num_groups: int = 1,
        groups_per_token: int = 1,
        second_choice_threshold: float | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 0,
        drop_policy: str = "position",
        init_std: float = 0.02,
        balancer: Callable[..., Balancer] | None = None,
    ) -> None:
        super().__init__()
        within("top_k", top_k, 1, num_experts)
        choice("score_fn", score_fn, ("softmax", "sigmoid"))
        choice("order", order, ("score_first", "top_k_first"))
        within("route_scale", route_scale, 0, above=True)
        within("jitter_eps", jitter_eps, 0, 1, below=True)
        within("min_capacity", min_capacity, 0)
        choice("drop_policy", drop_policy, ("position", "batch_priority", "probability"))
        for field, factor in (
            ("capacity_factor", capacity_factor),
            ("eval_capacity_factor", eval_capacity_factor),
        ):
            if factor is not None and factor <= 0:
                raise ValueError(f"{field}={factor}: must be above 0, or null for dropless")
        _check_weights(top_k, score_fn, order, normalize_weights, noise, second_choice_threshold)
        if noise and balancer is not None:
            raise ValueError("noise=true picks by noisy logits: it cannot have a balancer as well")
        _check_groups(num_experts, top_k, num_groups, groups_per_token, balancer is not None)
        self.num_experts, self.top_k = num_experts, top_k
        self.score_fn, self.order, self.normalize_weights = score_fn, order, normalize_weights
        self.route_scale, self.jitter_eps = route_scale, jitter_eps
        self.num_groups, self.groups_per_token = num_groups, groups_per_token
        self.second_choice_threshold = second_choice_threshold
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity, self.drop_policy = min_capacity, drop_policy
        self.gate = Gate(d_model, num_experts, init_std)
        self.noise_gate = Gate(d_model, num_experts, 0.0) if noise else None
        self.balancer = None if balancer is None else balancer(num_experts=num_experts)
        self.order_dependent = getattr(self.balancer, "order_dependent", False) or (
            drop_policy == "position" and (capacity_factor or eval_capacity_factor) is not None
        )

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of K picks a token; the padding of ``context.valid`` picks nothing."""
        valid = None if context is None else context.valid
        draws = self._generator(x, context)
        with full_precision(x):
            logits = self.gate(self._jitter(x, draws))
            scores = logits.softmax(-1) if self.score_fn == "softmax" else logits.sigmoid()
            probs = scores
            if self.score_fn == "sigmoid":  # scores over their sum, also where all scores underflow
                probs = F.logsigmoid(logits).softmax(-1)
            values, chances = logits, None
            if self.noise_gate is not None and draws is not None:
                values, std = noisy_logits(logits, self.noise_gate(x), draws)
                chances = selection_probability(logits, values, std, self.top_k)
            ranked, proposal = self._rank(values, scores, context)
            experts = ranked.topk(self.top_k, dim=-1).indices
            weights = self._weigh(experts, values, scores)
            asked = self._second_choices(weights, draws)
            kept = self._capacity(experts, weights, scores, asked, valid)
        extras = {"selection_probs": chances, "proposal": proposal}
        return RouterOutput.from_top_k(
            logits, probs, experts, weights, kept=kept, asked=asked, valid=valid, **extras
        )

    @property
    def causal(self) -> bool:
        """Whether evaluation looks at no later token."""
        return self.eval_capacity_factor is None or self._queues_in_order

    @property
    def causal_training(self) -> bool:
        """The same in training."""
        in_order = self.capacity_factor is None or self._queues_in_order
        return in_order and (self.balancer is None or self.balancer.causal_training)

    @property
    def _queues_in_order(self) -> bool:
        """Whether the queue in front of a token holds earlier tokens only."""
        return self.top_k == 1 and self.drop_policy == "position"

    def update(self, requests_per_expert: Int[Tensor, "E"], proposal: Float[Tensor, "E"]) -> None:
        """Hands the counts of an optimizer step to the balancer."""
        if self.balancer is not None:
            self.balancer.update(requests_per_expert, proposal)

    def _rank(
        self, logits: Tensor, scores: Tensor, context: RoutingContext | None
    ) -> tuple[Tensor, Tensor | None]:
        """By what experts are picked: logits, since scores saturate and tie where they do, or
        biased scores; minus infinity outside a token's groups.
        """
        ranked, proposal = logits.detach(), None
        if self.balancer is not None:
            ranked = scores.detach()
            bias, proposal = self.balancer(ranked, self.top_k, context)
            ranked = ranked + bias
        if self.num_groups > 1:
            best = 1 if self.balancer is None else 2
            ranked = limit_to_groups(ranked, self.num_groups, self.groups_per_token, best)
        return ranked, proposal

    def _weigh(self, experts: Tensor, values: Tensor, scores: Tensor) -> Tensor:
        if self.order == "top_k_first":
            weights = values.gather(-1, experts).softmax(-1)
        else:
            weights = scores.gather(-1, experts)
            if self.normalize_weights:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights if self.route_scale == 1 else weights * self.route_scale

    def _second_choices(self, weights: Tensor, draws: torch.Generator | None) -> Tensor | None:
        if self.second_choice_threshold is None or draws is None:
            return None
        share = weights / (weights.sum(-1, keepdim=True) + 1e-9)
        uniform = torch.rand(share.shape, generator=draws, device=share.device)
        asked = share > uniform * self.second_choice_threshold
        asked[:, 0] = True
        return asked

    def _capacity(
        self,
        experts: Tensor,
        weights: Tensor,
        scores: Tensor,
        asked: Tensor | None,
        valid: Tensor | None,
    ) -> Tensor | None:
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return None
        num_tokens = len(experts) if valid is None else int(valid.sum())
        slots = expert_capacity(factor, num_tokens, self.top_k, self.num_experts)
        queue = None
        if self.drop_policy == "batch_priority":
            queue = queue_by_priority(scores.detach().amax(-1), self.top_k)
        elif self.drop_policy == "probability":
            queue = queue_by_weight(weights.detach())
        if valid is not None:
            real = valid[:, None].expand_as(experts)
            asked = real if asked is None else asked & real
        return within_capacity(experts, max(slots, self.min_capacity), asked, queue)

    def _generator(self, x: Tensor, context: RoutingContext | None) -> torch.Generator | None:
        """Where this forward pass draws from; None where it draws nothing."""
        draws = self.jitter_eps or self.noise_gate is not None or self.second_choice_threshold
        if not (self.training and draws):
            return None
        if context is None:
            raise ValueError(
                "jitter_eps > 0, noise and second_choice_threshold draw from context.seed: "
                "pass a RoutingContext"
            )
        return context.generator(x.device)

    def _jitter(self, x: Tensor, draws: torch.Generator | None) -> Tensor:
        if draws is None or not self.jitter_eps:
            return x
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        noise = torch.rand(x.shape, generator=draws, device=x.device)
        return x * (1 + self.jitter_eps * (2 * noise - 1))


def _check_weights(
    top_k: int,
    score_fn: str,
    order: str,
    normalize_weights: bool,
    noise: bool,
    second_choice_threshold: float | None,
) -> None:
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
    if noise and order != "top_k_first":
        raise ValueError(
            f"noise=true weighs experts by their noisy logits: it needs order='top_k_first' "
            f"(got {order!r})"
        )
    if second_choice_threshold is not None:
        within("second_choice_threshold", second_choice_threshold, 0, above=True)
        if top_k == 1:
            raise ValueError("second_choice_threshold: there is no second choice with top_k=1")


def _check_groups(
    num_experts: int, top_k: int, num_groups: int, groups_per_token: int, biased: bool
) -> None:
    within("num_groups", num_groups, 1, num_experts)
    within("groups_per_token", groups_per_token, 1, num_groups)
    if num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups}: must divide num_experts={num_experts}")
    size = num_experts // num_groups
    if num_groups > 1 and top_k > size * groups_per_token:
        raise ValueError(
            f"top_k={top_k}: groups_per_token={groups_per_token} groups of {size} experts hold "
            f"only {size * groups_per_token}"
        )
    if num_groups > 1 and biased and size < 2:
        raise ValueError(
            f"num_groups={num_groups}: with a balancer a group is scored by its two best experts, "
            f"so at most num_experts / 2 = {num_experts // 2}"
        )
