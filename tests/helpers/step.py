"""One optimizer step, whole and cut: what every loss on records is put through."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals

Make = Callable[[Tensor, Tensor | None], RouterOutput]


def top_k_output(logits: Tensor, valid: Tensor | None = None, top_k: int = 2) -> RouterOutput:
    """Top-k of a softmax with normalised weights, and some selection probabilities."""
    probs = logits.softmax(-1)
    picked = probs.topk(top_k)
    weights = picked.values / picked.values.sum(-1, keepdim=True)
    return RouterOutput.from_top_k(
        logits, probs, picked.indices, weights, valid=valid, selection_probs=logits.sigmoid()
    )


def shares_against_whole(
    loss: Any, make: Make = top_k_output, num_experts: int = 4
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Value and gradient of the logits: of shares added over three unequal micro-batches (the last
    one nothing but padding), and of the same tokens as one record.
    """
    length, sizes = 3, (1, 3, 1)
    logits = torch.randn(sum(sizes) * length, num_experts, dtype=torch.float64)
    valid = torch.ones(sum(sizes), length, dtype=torch.bool)
    valid[1, 1:], valid[4] = False, False
    results = []
    for cut in (sizes, (sum(sizes),)):
        z = logits.clone().requires_grad_()
        rows = [size * length for size in cut]
        parts = zip(z.split(rows), valid.flatten().split(rows), cut, strict=True)
        parts = [(make(part, mask), RoutingContext(n, length, mask)) for part, mask, n in parts]
        totals = None
        if len(cut) > 1:
            sums = None
            if loss.needs_step_sums:
                sums = torch.stack([loss.step_sums(*part).detach() for part in parts]).sum(0)
            sequences = valid.any(1).sum().float()
            totals = StepTotals(valid.sum().float(), sequences, sums)
        value = torch.stack([loss(*part, totals) for part in parts]).sum()
        value.backward()
        results.append((value.detach(), z.grad))
    return results[0], results[1]


def padded_against_cut(
    loss: Any, make: Make = top_k_output, num_experts: int = 4
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Value and gradient of the logits: with wild padding, and without the padding. The gradient
    of the padding itself is the last row of both and has to be 0.
    """
    logits = torch.randn(10, num_experts, dtype=torch.float64)
    valid = torch.tensor([True, True, True, False, False] * 2)
    logits[~valid] = 50 * torch.randn(4, num_experts, dtype=torch.float64)
    results = []
    for rows in (torch.arange(10), valid.nonzero()[:, 0]):
        z = logits[rows].requires_grad_()
        mask = valid if len(rows) == 10 else None
        value = loss(make(z, mask), RoutingContext(2, len(rows) // 2, mask))
        value.backward()
        assert z.grad is not None
        padding = torch.zeros_like(z.grad[:1])
        if mask is not None:
            padding = z.grad[~mask].abs().amax(0, keepdim=True)
        kept = z.grad if mask is None else z.grad[mask]
        results.append((value.detach(), torch.cat([kept, padding])))
    return results[0], results[1]
