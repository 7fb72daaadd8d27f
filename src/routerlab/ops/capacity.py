"""Which assignments fit when an expert has a fixed number of slots."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def expert_capacity(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Slots of an expert: ``ceil(capacity_factor * T * K / E)``, as Megatron counts (K included).

    Switch and flaxformer leave K out; their factor is K times ours.
    """
    exact = capacity_factor * num_tokens * top_k / num_experts
    return math.ceil(exact - 1e-9)  # 1.1 * 50 * 2 / 10 is 11, not the 12 of its rounding error


def within_capacity(
    expert_indices: Int[Tensor, "T K"],
    capacity: int,
    asked: Bool[Tensor, "T K"] | None = None,
    queue: Int[Tensor, "N"] | None = None,
) -> Bool[Tensor, "T K"]:
    """True for the picks that get a slot; picks outside ``asked`` take none.

    ``queue`` is the order in which picks are served, with pick k of token t numbered ``k T + t``.
    By default all first choices come before any second choice, left to right within a choice
    (GShard, arXiv 2006.16668, algorithm 1).
    """
    num_tokens, top_k = expert_indices.shape
    experts = expert_indices.T.reshape(-1)  # choice-major
    if asked is not None:
        nobody = experts.max() + 1  # a queue of their own, behind all experts
        experts = torch.where(asked.T.reshape(-1), experts, nobody)
    if queue is not None:
        experts = experts[queue]
    experts, order = torch.sort(experts, stable=True)
    first = torch.searchsorted(experts, experts)  # where each expert's queue begins
    place = torch.arange(len(experts), device=experts.device) - first
    picks = order if queue is None else queue[order]
    kept = torch.empty_like(experts, dtype=torch.bool).scatter_(0, picks, place < capacity)
    kept = kept.view(top_k, num_tokens).T
    return kept if asked is None else kept & asked


def queue_by_priority(priority: Float[Tensor, "T"], top_k: int) -> Int[Tensor, "N"]:
    """Choice by choice, and in each the tokens of high ``priority`` first (batch-priority routing,
    Riquelme et al., arXiv 2106.05974).
    """
    tokens = priority.argsort(descending=True, stable=True)
    choices = torch.arange(top_k, device=tokens.device)[:, None]
    return (choices * len(tokens) + tokens).reshape(-1)


def queue_by_weight(weights: Float[Tensor, "T K"]) -> Int[Tensor, "N"]:
    """All picks by their weight: an expert keeps the picks that value it most."""
    return weights.T.reshape(-1).argsort(descending=True, stable=True)
