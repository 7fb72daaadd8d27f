"""Rows exchanged between processes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import (
    all_reduce,
    all_to_all_single_autograd,
    wait_tensor,
)


def all_to_all(
    rows: Float[Tensor, "N *shape"], send: list[int], receive: list[int], group: ProcessGroup
) -> Float[Tensor, "R *shape"]:
    """Sends the first ``send[0]`` rows to process 0 of the group, the next ``send[1]`` to process 1
    and so on; returns the ``receive[p]`` rows that each process p sent here, in the order of p.

    Sizes may be 0. The gradient goes the way back. Every process of the group must call it, and
    so must their backward passes.
    """
    return all_to_all_single_autograd(rows.contiguous(), receive, send, group)


def gather_counts(counts: Int[Tensor, "E"], group: ProcessGroup) -> Int[Tensor, "P E"]:
    """The counts of each process of the group, on the CPU: the only wait for a device."""
    gathered = [torch.empty_like(counts) for _ in range(group.size())]
    dist.all_gather(gathered, counts, group)
    return torch.stack(gathered).cpu()


def average_gradients(
    weights: Sequence[Tensor], replicas: ProcessGroup | None, num_processes: int
) -> tuple[Tensor, ...]:
    """The same weights; their gradients are summed over ``replicas``, which hold the same weights
    (None: there are no others), and divided by ``num_processes``.
    """
    return _AverageGradients.apply(replicas, num_processes, *weights)


class _AverageGradients(torch.autograd.Function):
    """One node for all weights, so that all processes reduce them in the same order."""

    @staticmethod
    def forward(
        ctx: Any, replicas: ProcessGroup | None, num_processes: int, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.replicas, ctx.num_processes = replicas, num_processes
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        means = [grad / ctx.num_processes for grad in grads]
        if ctx.replicas is not None:
            means = [all_reduce(mean, "sum", ctx.replicas) for mean in means]
        return None, None, *(wait_tensor(mean) for mean in means)


def recompute_from_here(y: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """The same rows. Activation checkpointing starts to recompute at the last tensor that was
    saved for backward and stops recomputing there. What experts save may depend on how many rows
    they have; one more tensor, saved behind them on every process, makes all processes start and
    stop between the same collectives.
    """
    return _SaveNothing.apply(y)


class _SaveNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y.new_empty(0))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return grads[0]
