"""Routing is a value: what a router is told, what it decided, and the sums of one training step."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from routerlab.core.seeding import stable_seed


@dataclass(frozen=True, slots=True, eq=False)
class RoutingContext:
    """What a router may know besides its tokens. It reads what it needs and ignores the rest."""

    batch_size: int
    sequence_length: int
    valid: Bool[Tensor, "T"] | None = None  # False on padding; None: no padding
    prompt: Bool[Tensor, "T"] | None = None  # True on what a generator would be given
    domain_ids: Int[Tensor, "B"] | None = None  # labels for diagnostics, not for routers
    num_domains: int = 0
    task_ids: Int[Tensor, "B"] | None = None
    sample_ids: Int[Tensor, "B"] | None = None  # numbers of samples, for losses that know a bank
    noise_level: Float[Tensor, "B"] | None = None  # diffusion
    sequence_embedding: Float[Tensor, "B D"] | None = None
    progress: float = 0.0  # share of training done, in [0, 1]
    token_ids: Int[Tensor, "T"] | None = None  # vocabulary ids; the backbone fills them in
    seed: int = 0  # of run seed, step, micro-batch and rank
    step_seed: int = 0  # of run seed and step: equal in all micro-batches and on all ranks
    layer: int = 0
    replica: int = 0  # the batch is num_replicas equal blocks of the same sequences: the samples
    num_replicas: int = 1  # replica, replica + 1, ... of a policy

    def at_layer(self, layer: int) -> "RoutingContext":
        """The same context as seen by layer number ``layer``."""
        return replace(self, layer=layer)

    def generator(self, device: torch.device) -> torch.Generator:
        """A fresh generator of (seed, layer): a recomputed forward pass draws the same numbers."""
        return torch.Generator(device).manual_seed(stable_seed(self.seed, self.layer))

    def generators(self, device: torch.device) -> list[torch.Generator]:
        """One of (seed, layer, replica) for each block: the draws of a sample do not depend on
        which other samples run beside it.
        """
        replicas = range(self.replica, self.replica + self.num_replicas)
        seeds = (stable_seed("replica", self.seed, self.layer, replica) for replica in replicas)
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def step_generator(self, device: torch.device) -> torch.Generator:
        """The like of (step_seed, layer): one draw for all micro-batches and ranks of a step."""
        return torch.Generator(device).manual_seed(stable_seed("step", self.step_seed, self.layer))


@dataclass(frozen=True, slots=True, eq=False)
class RouterOutput:
    """What a router decided: the one record that experts, losses and diagnostics read.

    Assignment ``n`` sends token ``token_indices[n]`` to expert ``expert_indices[n]``, whose output
    counts ``combine_weights[n]``. Only kept assignments are in the record: there are no sentinels.

    ``router_probs`` is the full distribution before selection; its rows sum to 1.
    ``top_k`` is set when every token has exactly K assignments, stored token by token (N = T K).
    ``dropped_per_expert`` counts assignments lost to capacity, by the expert they asked for.
    ``log_prob`` is the log-probability of a sampled selection, for policy gradients.
    ``selection_probs`` is each expert's chance to be picked under fresh noise (noisy top-k).
    ``proposal`` is what this micro-batch proposes for the state that the router keeps between steps
    (a bias, thresholds): after the optimizer step its mean goes to the router's ``update``.
    """

    router_logits: Float[Tensor, "T E"]
    router_probs: Float[Tensor, "T E"]
    token_indices: Int[Tensor, "N"]
    expert_indices: Int[Tensor, "N"]
    combine_weights: Float[Tensor, "N"]
    dropped_per_expert: Int[Tensor, "E"]
    top_k: int | None = None
    log_prob: Float[Tensor, "T"] | None = None
    selection_probs: Float[Tensor, "T E"] | None = None
    proposal: Float[Tensor, "P"] | None = None
    valid: Bool[Tensor, "T"] | None = None

    @classmethod
    def from_top_k(
        cls,
        router_logits: Float[Tensor, "T E"],
        router_probs: Float[Tensor, "T E"],
        expert_indices: Int[Tensor, "T K"],
        combine_weights: Float[Tensor, "T K"],
        kept: Bool[Tensor, "T K"] | None = None,
        asked: Bool[Tensor, "T K"] | None = None,
        valid: Bool[Tensor, "T"] | None = None,
        **extras: Tensor | None,
    ) -> "RouterOutput":
        """The record of K picks a token. Padding leaves it, and so do picks outside ``asked`` (not
        wanted after all) and outside ``kept`` (lost to capacity, and counted as such).

        ``extras``: ``log_prob``, ``selection_probs``, ``proposal``.
        """
        num_tokens, top_k = expert_indices.shape
        tokens = torch.arange(num_tokens, device=expert_indices.device)
        tokens = tokens[:, None].expand(num_tokens, top_k)
        dropped = router_logits.new_zeros(router_logits.shape[1], dtype=torch.long)
        if valid is not None:
            real = valid[:, None].expand_as(expert_indices)
            asked = real if asked is None else asked & real
        if kept is not None:
            lost = ~kept if asked is None else ~kept & asked
            dropped.scatter_add_(0, expert_indices.flatten(), lost.flatten().long())
            asked = kept if asked is None else kept & asked
        flat = _only(asked, tokens, expert_indices, combine_weights)
        return cls(
            router_logits=router_logits,
            router_probs=router_probs,
            token_indices=flat[0],
            expert_indices=flat[1],
            combine_weights=flat[2],
            dropped_per_expert=dropped,
            top_k=top_k if asked is None else None,
            valid=valid,
            **extras,
        )

    @classmethod
    def from_expert_choice(
        cls,
        router_logits: Float[Tensor, "T E"],
        router_probs: Float[Tensor, "T E"],
        token_indices: Int[Tensor, "E C"],
        combine_weights: Float[Tensor, "E C"],
        valid: Bool[Tensor, "T"] | None = None,
        **extras: Tensor | None,
    ) -> "RouterOutput":
        """The record of experts that each pick C tokens; picks of padding leave it."""
        experts = torch.arange(len(token_indices), device=token_indices.device)
        experts = experts[:, None].expand_as(token_indices)
        kept = None if valid is None else valid[token_indices]
        flat = _only(kept, token_indices, experts, combine_weights)
        dropped = router_logits.new_zeros(router_logits.shape[1], dtype=torch.long)
        return cls(
            router_logits,
            router_probs,
            *flat,
            dropped_per_expert=dropped,
            top_k=None,
            valid=valid,
            **extras,
        )

    @classmethod
    def from_dispatch_mask(
        cls,
        router_logits: Float[Tensor, "T E"],
        router_probs: Float[Tensor, "T E"],
        dispatch_mask: Bool[Tensor, "T E"],
        combine_weights: Float[Tensor, "T E"],
        dropped_per_expert: Int[Tensor, "E"] | None = None,
        valid: Bool[Tensor, "T"] | None = None,
        **extras: Tensor | None,
    ) -> "RouterOutput":
        """The record of any choice map, token by token, with any number of experts a token."""
        mask = dispatch_mask if valid is None else dispatch_mask & valid[:, None]
        tokens, experts = mask.nonzero(as_tuple=True)
        if dropped_per_expert is None:
            dropped_per_expert = router_logits.new_zeros(router_logits.shape[1], dtype=torch.long)
        return cls(
            router_logits=router_logits,
            router_probs=router_probs,
            token_indices=tokens,
            expert_indices=experts,
            combine_weights=combine_weights[tokens, experts],
            dropped_per_expert=dropped_per_expert,
            top_k=None,
            valid=valid,
            **extras,
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router_logits.shape[1]

    @property
    def num_dropped(self) -> Int[Tensor, ""]:
        """Assignments lost to capacity."""
        return self.dropped_per_expert.sum()

    @property
    def tokens_per_expert(self) -> Int[Tensor, "E"]:
        """Assignments that each expert works on (after capacity drops)."""
        return count_experts(self.expert_indices, self.num_experts)

    @property
    def requests_per_expert(self) -> Int[Tensor, "E"]:
        """Assignments that the router asked for (before capacity drops): what balance is about."""
        return self.tokens_per_expert + self.dropped_per_expert

    @property
    def expert_load(self) -> Float[Tensor, "E"]:
        """Each expert's share of the requested assignments; sums to 1."""
        counts = self.requests_per_expert
        return counts / counts.sum().clamp(min=1)

    @property
    def dispatch_mask(self) -> Bool[Tensor, "T E"]:
        """True where a token is sent to an expert."""
        mask = torch.zeros_like(self.router_logits, dtype=torch.bool)
        mask[self.token_indices, self.expert_indices] = True
        return mask

    def without_padding(self, per_token: Tensor) -> Tensor:
        """The rows of a [T ...] tensor that belong to real tokens."""
        return per_token if self.valid is None else per_token[self.valid]


@dataclass(frozen=True, slots=True, eq=False)
class StepTotals:
    """Sums over a whole optimizer step: all its micro-batches, on all ranks, padding excluded.

    A loss divides by these, so its value and gradient do not depend on how the step is cut.
    ``sums`` are the ``step_sums`` of the loss at hand in one layer, where it has any.
    """

    num_tokens: Float[Tensor, ""]
    num_sequences: Float[Tensor, ""]
    sums: Float[Tensor, "P"] | None = None

    @classmethod
    def of(
        cls,
        output: RouterOutput,
        context: RoutingContext | None = None,
        sums: Float[Tensor, "P"] | None = None,
    ) -> "StepTotals":
        """The totals of a step that consists of this one record."""
        num_tokens, num_sequences = count_tokens(output, context)
        return cls(num_tokens.clamp(min=1), num_sequences.clamp(min=1), sums)


def _only(mask: Bool[Tensor, "A B"] | None, *picks: Shaped[Tensor, "A B"]) -> list[Tensor]:
    """The picks within ``mask``, in a row. It is searched once, since a GPU is waited for."""
    flat = [pick.reshape(-1) for pick in picks]
    if mask is None:
        return flat
    places = mask.reshape(-1).nonzero()[:, 0]
    return [pick.index_select(0, places) for pick in flat]


def count_experts(expert_indices: Int[Tensor, "N"], num_experts: int) -> Int[Tensor, "E"]:
    """How often each expert occurs. A scatter, so a GPU need not be waited for."""
    counts = torch.zeros(num_experts, dtype=torch.long, device=expert_indices.device)
    return counts.scatter_add_(0, expert_indices, torch.ones_like(expert_indices))


def count_tokens(
    output: RouterOutput, context: RoutingContext | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Real tokens, and sequences that hold at least one. Without a context: one sequence."""
    logits = output.router_logits
    num_sequences = 1 if context is None else context.batch_size
    if output.valid is None:
        return logits.new_full((), len(logits)), logits.new_full((), num_sequences)
    per_sequence = output.valid.view(num_sequences, -1).sum(1)
    return per_sequence.sum().to(logits.dtype), (per_sequence > 0).sum().to(logits.dtype)


_records: tuple[type[Any], ...] = (RouterOutput, RoutingContext, StepTotals)
for _record in _records:  # pytrees: they pass through activation checkpointing and compile
    torch.export.register_dataclass(_record)
