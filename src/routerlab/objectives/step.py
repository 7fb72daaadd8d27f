"""An optimizer step cut into micro-batches and ranks: its pieces and its sums."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals

Batch = dict[str, Tensor]
Records = Mapping[str, RouterOutput]  # layer -> record
Sums = dict[tuple[str, str], Tensor]  # (name of a loss or of a quantity, layer) -> sums


def world_size() -> int:
    """Number of data-parallel processes."""
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if on else 1


def rank() -> int:
    """Number of this process, from 0."""
    return torch.distributed.get_rank() if world_size() > 1 else 0


def all_reduce(value: Tensor) -> Tensor:
    """The sum of ``value`` over ranks."""
    if world_size() > 1:
        torch.distributed.all_reduce(value)
    return value


def all_reduce_max(value: Tensor) -> Tensor:
    """The largest ``value`` of all ranks, element by element."""
    if world_size() > 1:
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return value


def split_batch(batch: Batch, micro_batches: int) -> list[Batch]:
    """The micro-batches of a batch, of sizes that differ by at most one sequence."""
    size = len(batch["input_ids"])
    if micro_batches > size:
        raise ValueError(
            f"micro_batches={micro_batches}: must be at most the {size} sequences that a rank has "
            "in a step"
        )
    pieces = {key: value.tensor_split(micro_batches) for key, value in batch.items()}
    return [{key: piece[i] for key, piece in pieces.items()} for i in range(micro_batches)]


def step_totals(
    contexts: Sequence[RoutingContext],
    num_targets: Tensor,
    reduce: Callable[[Tensor], Tensor] = all_reduce,
) -> tuple[StepTotals, Tensor]:
    """Tokens, sequences and targets of the step, over micro-batches and, by ``reduce``, ranks.

    ``num_targets`` is this rank's number of targets; each total is at least 1.
    """
    rows = []
    for context in contexts:
        per_sequence = num_targets.new_full((context.batch_size,), context.sequence_length)
        if context.valid is not None:
            per_sequence = context.valid.view(context.batch_size, -1).sum(1)
        rows.append(torch.stack([per_sequence.sum(), (per_sequence > 0).sum()]))
    flat = torch.cat([torch.stack(rows).sum(0), num_targets.view(1)]).double()
    tokens, sequences, targets = reduce(flat).clamp(min=1).float()
    return StepTotals(tokens, sequences), targets


def add_up(terms: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of each named term."""
    return {key: sum_of([each[key] for each in terms]) for key in (terms[0] if terms else {})}


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """Their sum, in order; of one value that value itself."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


@torch.no_grad()
def sum_over_step(
    parts: Sequence[Sums], mean: bool = False, reduce: Callable[[Tensor], Tensor] = all_reduce
) -> Sums:
    """The sum (or mean) of each named tensor over micro-batches and, by ``reduce``, ranks."""
    if not parts or not parts[0]:
        return {}
    stacked = [torch.stack([part[key].double() for part in parts]).sum(0) for key in parts[0]]
    flat = reduce(torch.cat([tensor.reshape(-1) for tensor in stacked]))
    if mean:
        flat = flat / (len(parts) * world_size())
    split = flat.split([tensor.numel() for tensor in stacked])
    shaped = [new.view_as(old) for new, old in zip(split, stacked, strict=True)]
    return dict(zip(parts[0], shaped, strict=True))
