"""Expert choice: every expert picks its best tokens."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from routerlab.core.checks import choice, within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.capped_choice import capped_choice
from routerlab.routers.gate import Gate, full_precision


class ExpertChoice(nn.Module):
    r"""Each expert's k tokens with the largest scores, in each group of n tokens.

    Zhou et al., arXiv 2202.09368, section 3.2: with :math:`S = \mathrm{softmax}(x W^T)` over
    experts, expert i takes the :math:`k = \lfloor c\,n/E \rfloor` largest :math:`S_{\cdot i}`, at
    least one and at most n (n counts real tokens). Loads are equal by construction; a token has any
    number of experts, c on average, and may have none. The combine weight is S itself, not
    renormalised. The router learns through it alone: the choice has no gradient.

    A token's experts depend on later tokens, so a causal language model leaks the future in
    training. ``inference="thresholds"`` makes evaluation causal [reconstructed]: a token goes to
    every expert whose score exceeds that expert's threshold, a running mean of its k-th largest
    score in training. A token then has nearly c experts on average where k is large (1.96 of 2 at
    k = 32) and fewer where it is small (half at k = 1). Before the first update there are no
    thresholds, and a token goes to its best ceil(c) experts.

    With ``max_experts_per_token`` (section 3.3) a token has at most b experts: tokens are picked
    from the plan of `ops.capped_choice`. Its solver is slow: a sweep costs about eight softmaxes
    over the logits, so ``cap_iterations`` of them may cost more than the experts. A group where not
    even one token an expert fits (E > b n) gets no experts. With thresholds, a token above those of
    more than b experts keeps its b best.

    Args:
        d_model: D, width of the tokens.
        num_experts: E.
        capacity_factor: c, mean experts per token, above 0 and at most E.
        group: tokens that compete: of a ``sequence``, or of the whole (micro-)``batch``. Without a
            context all tokens are one group.
        max_experts_per_token: b, at least c; null sets no cap.
        cap_temperature: :math:`\lambda` of the entropy.
        cap_iterations: sweeps of the solver.
        cap_repair: make the cap exact where the solver has not converged [reconstructed]; without,
            some tokens exceed it.
        inference: ``batch`` (the same rule in evaluation; not causal) or ``thresholds``.
        momentum: of the thresholds' running mean, which begins as a plain mean.
        noise_std: in training, logits get noise of this standard deviation over E (V-MoE,
            arXiv 2106.05974); the record holds the noisy logits.
        init_std: standard deviation of the gate's initial weights.
    """

    causal_training = False
    thresholds: Tensor
    num_updates: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        capacity_factor: float = 2.0,
        group: str = "sequence",
        max_experts_per_token: int | None = None,
        cap_temperature: float = 0.001,
        cap_iterations: int = 100,
        cap_repair: bool = True,
        inference: str = "batch",
        momentum: float = 0.99,
        noise_std: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        within("capacity_factor", capacity_factor, 0, num_experts, above=True)
        choice("group", group, ("sequence", "batch"))
        if max_experts_per_token is not None:
            within("max_experts_per_token", max_experts_per_token, capacity_factor)
        within("cap_temperature", cap_temperature, 1e-6)
        within("cap_iterations", cap_iterations, 1)
        choice("inference", inference, ("batch", "thresholds"))
        within("momentum", momentum, 0, 1, below=True)
        within("noise_std", noise_std, 0)
        self.num_experts, self.capacity_factor = num_experts, capacity_factor
        self.group, self.inference = group, inference
        self.max_experts_per_token, self.cap_repair = max_experts_per_token, cap_repair
        self.cap_temperature, self.cap_iterations = cap_temperature, cap_iterations
        self.momentum, self.noise_std = momentum, noise_std
        self.causal = inference == "thresholds"
        self.gate = Gate(d_model, num_experts, init_std)
        if inference == "thresholds":
            self.register_buffer("thresholds", torch.zeros(num_experts))
            self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of all picks; with thresholds, training also proposes new ones [E]."""
        valid = None if context is None else context.valid
        with full_precision(x):
            logits = self._noisy(self.gate(x), context)
            probs = logits.softmax(-1)
            proposal = None
            if self.causal and not self.training:
                mask = self._above_thresholds(probs.detach())
            else:
                mask, proposal = self._choose(probs.detach(), context)
            return RouterOutput.from_dispatch_mask(
                logits, probs, mask, probs, valid=valid, proposal=proposal
            )

    @torch.no_grad()
    def update(
        self, requests_per_expert: Int[Tensor, "E"], proposal: Float[Tensor, "E"] | None
    ) -> None:
        """Moves the thresholds, where there are any, towards the step's."""
        if proposal is None or not self.causal:
            return
        self.num_updates += 1
        rate = (1 / self.num_updates).clamp(min=1 - self.momentum).to(self.thresholds)
        self.thresholds.lerp_(proposal.to(self.thresholds), rate)

    @property
    def top_k(self) -> float:
        """Mean experts per token."""
        return float(self.capacity_factor)

    def slots(self, num_tokens: int) -> int:
        """Tokens that an expert takes of a group of so many."""
        slots = math.floor(self.capacity_factor * num_tokens / self.num_experts + 1e-9)
        slots = min(max(slots, 1), num_tokens)
        cap = self.max_experts_per_token
        fits = cap is None or self.num_experts * slots <= cap * num_tokens
        return slots if fits else 0

    def _choose(
        self, probs: Float[Tensor, "T E"], context: RoutingContext | None
    ) -> tuple[Bool[Tensor, "T E"], Float[Tensor, "E"] | None]:
        """The choice map and, with thresholds, what they are to become."""
        num_groups = 1
        if context is not None and self.group == "sequence":
            num_groups = context.batch_size
        size = len(probs) // num_groups
        scores = probs.view(num_groups, size, self.num_experts).transpose(1, 2).contiguous()
        real, sizes = None, [size] * num_groups
        if context is not None and context.valid is not None:
            real = context.valid.view(num_groups, size)
            sizes = real.sum(1).tolist()
            scores = scores.masked_fill(~real[:, None], -torch.inf)
        slots = [self.slots(size) for size in sizes]
        mask, proposal = _top_tokens(scores, slots), None
        if self.causal:
            proposal = self._proposal(scores, mask, sizes)
        if self.max_experts_per_token is not None:
            mask = self._capped(scores, real, slots, self.max_experts_per_token)
        return mask.transpose(1, 2).reshape(probs.shape), proposal

    def _capped(
        self,
        scores: Float[Tensor, "G E n"],
        real: Bool[Tensor, "G n"] | None,
        slots: list[int],
        cap: int,
    ) -> Bool[Tensor, "G E n"]:
        """The choice map with a cap: padding leaves its group before the plan is made."""
        knobs = (cap, self.cap_temperature, self.cap_iterations, self.cap_repair)
        if real is None:
            return capped_choice(scores, slots[0], *knobs)
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for part, tokens, keep, count in zip(mask, scores, real, slots, strict=True):
            if count:
                part[:, keep] = capped_choice(tokens[None, :, keep], count, *knobs)[0]
        return mask

    def _proposal(
        self, scores: Float[Tensor, "G E n"], mask: Bool[Tensor, "G E n"], sizes: list[int]
    ) -> Float[Tensor, "E"]:
        """The k-th largest scores, averaged over groups by their tokens; the present thresholds if
        no group chose any.
        """
        chose = mask[:, 0].any(-1)
        weights = chose * scores.new_tensor(sizes)
        if not chose.any():
            return self.thresholds.to(scores)
        lowest = torch.where(mask, scores, torch.inf).amin(-1)
        lowest = torch.where(chose[:, None], lowest, 0.0)
        return (weights[:, None] * lowest).sum(0) / weights.sum()

    def _above_thresholds(self, probs: Float[Tensor, "T E"]) -> Bool[Tensor, "T E"]:
        best = _best_experts(probs, math.ceil(self.capacity_factor))
        mask = torch.where(self.num_updates > 0, probs > self.thresholds, best)
        cap = self.max_experts_per_token
        if cap is not None:  # the best of all are the best of those above
            mask &= _best_experts(torch.where(mask, probs, -1.0), cap)
        return mask

    def _noisy(
        self, logits: Float[Tensor, "T E"], context: RoutingContext | None
    ) -> Float[Tensor, "T E"]:
        if not (self.training and self.noise_std):
            return logits
        if context is None:
            raise ValueError("noise_std > 0 draws from context.seed: pass a RoutingContext")
        generator = context.generator(logits.device)
        noise = torch.randn(
            logits.shape, generator=generator, device=logits.device, dtype=logits.dtype
        )
        return logits + noise * (self.noise_std / self.num_experts)


def _top_tokens(scores: Float[Tensor, "G E n"], slots: list[int]) -> Bool[Tensor, "G E n"]:
    """The choice map of experts that each take ``slots[g]`` tokens of group g."""
    equal = len(set(slots)) == 1
    top = scores.topk(max(slots), dim=-1, sorted=not equal).indices
    taken = torch.ones_like(top, dtype=torch.bool)
    if not equal:
        places = torch.arange(max(slots), device=scores.device)
        taken &= places < torch.tensor(slots, device=scores.device)[:, None, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, taken)


def _best_experts(scores: Float[Tensor, "T E"], count: int) -> Bool[Tensor, "T E"]:
    """The choice map of tokens that each take their ``count`` best experts (all, if fewer)."""
    best = scores.topk(min(count, scores.shape[1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
