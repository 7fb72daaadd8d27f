"""Records and contexts made by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput

# the running example of the diagnostics' tests: T=4, E=4, K=2; c = [3, 2, 2, 1]
EX_A_PROBS = [
    [0.6, 0.2, 0.15, 0.05],
    [0.45, 0.35, 0.15, 0.05],
    [0.05, 0.15, 0.2, 0.6],
    [0.4, 0.1, 0.3, 0.2],
]
EX_A_PICKS = [[0, 1], [0, 1], [3, 2], [0, 2]]


def record(
    probs: Sequence[Sequence[float]] | Tensor,
    picks: Sequence[Sequence[int]] | Tensor,
    kept: Tensor | None = None,
    valid: Tensor | None = None,
) -> RouterOutput:
    """A float64 record of given probabilities and picks; weights are the picked probabilities."""
    probs = torch.as_tensor(probs, dtype=torch.float64)
    picks = torch.as_tensor(picks)
    weights = probs.gather(1, picks)
    return RouterOutput.from_top_k(probs.log(), probs, picks, weights, kept=kept, valid=valid)


def ex_a(kept: Tensor | None = None) -> RouterOutput:
    """The running example: four tokens, four experts, two picks."""
    return record(EX_A_PROBS, EX_A_PICKS, kept=kept)


def random_record(
    num_tokens: int, num_experts: int, top_k: int, seed: int = 0, valid: Tensor | None = None
) -> RouterOutput:
    """Top-k of random softmax scores."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    probs = logits.softmax(-1)
    return record(probs, probs.topk(top_k).indices, valid=valid)


def ragged_record(num_tokens: int, num_experts: int, seed: int = 0) -> RouterOutput:
    """Any number of experts a token: none for token 0, all for token 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    mask = torch.rand(num_tokens, num_experts, generator=generator) < 0.4
    mask[0], mask[1] = False, True
    probs = logits.softmax(-1)
    return RouterOutput.from_dispatch_mask(logits, probs, mask, probs)
