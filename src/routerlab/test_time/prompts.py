"""The prompts of a batch, on their own: what a plug-in may look at."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Int
from torch import Tensor

from routerlab.core.routing import RoutingContext

_OF_SEQUENCES = ("domain_ids", "task_ids", "sample_ids", "noise_level", "sequence_embedding")


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """The P different prompts of a batch, padded on the right.

    ``context`` describes a pass over ``input_ids``; ``owner`` is the prompt of each row of the
    batch, ``first`` the first row of each prompt.
    """

    input_ids: Int[Tensor, "P S"]
    context: RoutingContext
    owner: Int[Tensor, "B"]
    first: Int[Tensor, "P"]


def distinct(
    batch: Mapping[str, Tensor], context: RoutingContext
) -> tuple[Int[Tensor, "B"], Int[Tensor, "P"]]:
    """Whose prompt each row begins with, and the first row of each prompt: rows of one item
    (``batch["item"]``) share theirs.
    """
    rows = torch.arange(context.batch_size, device=batch["input_ids"].device)
    if "item" not in batch:
        return rows, rows
    items, owner = batch["item"].unique(return_inverse=True)
    first = rows.new_full(items.shape, len(rows)).scatter_reduce(0, owner, rows, "amin")
    return owner, first


def of_rows(context: RoutingContext, rows: Int[Tensor, "P"]) -> RoutingContext:
    """The context of a pass over these rows of a batch."""
    size = (context.batch_size, -1)
    changes: dict[str, Tensor] = {}
    for field in fields(context):
        value = getattr(context, field.name)
        if value is not None and field.name in _OF_SEQUENCES:
            changes[field.name] = value[rows]
        elif isinstance(value, Tensor):
            changes[field.name] = value.view(size)[rows].flatten()
    return replace(context, batch_size=len(rows), **changes)


def moved_to(at: Int[Tensor, "B"], before: int, now: int) -> Int[Tensor, "B"] | None:
    """Where tokens of a pass over ``before`` tokens, one a row, are in one over ``now``: in the
    same columns of rows that have grown to the right; None where rows are shorter, since generation
    with a cache passes its new tokens alone.
    """
    length, grown = before // len(at), now // len(at)
    if grown < length:
        return None
    return at + torch.arange(len(at), device=at.device) * (grown - length)


def prompts_of(batch: Mapping[str, Tensor], context: RoutingContext) -> Prompts:
    """The prompts of a batch. Raises ValueError where the context tells no prompt."""
    if context.prompt is None:
        raise ValueError(
            "context.prompt=None: test-time routing looks at prompts alone, so it must be told "
            "what the prompt is (True on its tokens, also where that is all there is)"
        )
    owner, first = distinct(batch, context)
    prompt = context.prompt if context.valid is None else context.prompt & context.valid
    prompt = prompt.view(context.batch_size, -1)[first]
    counts = prompt.sum(1)
    length = int(counts.max())
    order = (~prompt).int().argsort(dim=1, stable=True)[:, :length]  # prompt tokens come first
    valid = torch.arange(length, device=counts.device) < counts[:, None]
    alone = replace(
        of_rows(replace(context, token_ids=None), first),
        sequence_length=length,
        valid=None if bool(valid.all()) else valid.flatten(),
        prompt=valid.flatten(),
    )
    return Prompts(batch["input_ids"][first].gather(1, order), alone, owner, first)
