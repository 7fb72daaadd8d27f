"""Which assignments fit when an expert has a fixed number of slots."""

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def expert_capacity(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Slots of an expert: ``ceil(capacity_factor * T * K / E)``, as Megatron counts (K included).

    Switch and flaxformer leave K out; their factor is K times ours.
    """
    exact = capacity_factor * num_tokens * top_k / num_experts
    return math.ceil(exact - 1e-9)  # 1.1 * 50 * 2 / 10 is 11, not the 12 of its rounding error


def within_capacity(
    expert_indices: Int[Tensor, "T K"], capacity: int, valid: Bool[Tensor, "T"] | None = None
) -> Bool[Tensor, "T K"]:
    """True for the picks that get a slot: all first choices queue before any second choice,
    left to right within a choice (GShard, arXiv 2006.16668, algorithm 1). Padding takes no slot.
    """
    num_tokens, top_k = expert_indices.shape
    queue = expert_indices.T.reshape(-1)  # choice-major
    if valid is not None:
        padding = queue.max() + 1  # a queue of their own, behind all experts
        queue = torch.where(valid.repeat(top_k), queue, padding)
    experts, order = torch.sort(queue, stable=True)
    first = torch.searchsorted(experts, experts)  # where each expert's queue begins
    place = torch.arange(len(queue), device=queue.device) - first
    kept = torch.empty_like(queue, dtype=torch.bool).scatter_(0, order, place < capacity)
    kept = kept.view(top_k, num_tokens).T
    return kept if valid is None else kept & valid[:, None]
