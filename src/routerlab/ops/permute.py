"""Rows of tokens to rows sorted by expert, and back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from routerlab.core.routing import RouterOutput


@dataclass(frozen=True, slots=True, eq=False)
class Permutation:
    """The order in which experts read the assignments of a record.

    Row ``r`` of the sorted rows is assignment ``order[r]``, of token ``tokens[r]``. ``rows[t]`` are
    the K rows of token ``t``: known when the record has ``top_k``, and then going back is one
    bag sum instead of a scatter.

    R is N, or more with filler rows: ``order`` is N there, the combine weight 0, so
    that experts add nothing for them to any output or gradient.
    """

    order: Int[Tensor, "R"]
    tokens: Int[Tensor, "R"]
    rows: Int[Tensor, "T K"] | None
    num_tokens: int
    num_assignments: int
    tokens_per_expert: Int[Tensor, "E"]  # filler rows included
    filled: bool

    def sort(self, per_assignment: Float[Tensor, "N"]) -> Float[Tensor, "R"]:
        """The values of assignments in the order of the rows, 0 for filler rows."""
        if self.filled:
            per_assignment = torch.cat([per_assignment, per_assignment.new_zeros(1)])
        return per_assignment.index_select(0, self.order)

    def unsort(self, per_row: Float[Tensor, "R"]) -> Float[Tensor, "N"]:
        """The values of rows in the order of the record; those of filler rows are left out."""
        if self.rows is not None:
            return per_row.index_select(0, self.rows.reshape(-1))
        size = self.num_assignments + self.filled
        return per_row.new_empty(size).index_copy_(0, self.order, per_row)[: self.num_assignments]


Fill = Callable[[list[int]], list[int]]  # rows of each expert -> as many or more


def sort_by_expert(output: RouterOutput, fill: Fill | None = None) -> Permutation:
    """The stable permutation that groups assignments by expert.

    ``fill`` says how many rows each expert is to have; the ones it lacks are filler rows (CPU only:
    elsewhere it would wait for the device). Small integers sort four times faster on CPU than
    int64, hence the cast.
    """
    small = torch.uint8 if output.num_experts <= 256 else torch.int16
    if output.num_experts > torch.iinfo(torch.int16).max:
        small = torch.int64
    order = torch.sort(output.expert_indices.to(small), stable=True).indices
    counts, tokens = output.tokens_per_expert, output.token_indices
    places = torch.arange(len(order), device=order.device)
    all_rows = order
    if fill is not None:
        padded = counts.new_tensor(fill(counts.tolist()))
        before = (padded - counts).cumsum(0) - (padded - counts)  # filler rows of earlier experts
        places = places + before.repeat_interleave(counts)
        nothing = order.new_full((int(padded.sum()),), len(order))
        all_rows, counts = nothing.index_copy(0, places, order), padded
        tokens = torch.cat([tokens, tokens[:1]])  # of a token that is routed: padding may hold NaN
    rows = None
    if output.top_k is not None:
        rows = torch.empty_like(order).scatter_(0, order, places).view(-1, output.top_k)
    tokens = tokens.index_select(0, all_rows)
    num_tokens, filled = len(output.router_logits), fill is not None
    return Permutation(all_rows, tokens, rows, num_tokens, len(order), counts, filled)


def few_sizes(counts: list[int]) -> list[int]:
    """``counts`` rounded up: to multiples of 16 until 512, then to 16 sizes an octave."""
    return [-(-count // (step := max(16, 1 << count.bit_length() >> 5))) * step for count in counts]


def gather(x: Float[Tensor, "T D"], by: Permutation) -> Float[Tensor, "R D"]:
    """The rows of ``x`` sorted by expert; its gradient is `combine`."""
    return _Gather.apply(x, by)


def combine(y: Float[Tensor, "R D"], by: Permutation) -> Float[Tensor, "T D"]:
    """For each token the sum of its rows; its gradient is `gather`."""
    return _Combine.apply(y, by)


def sum_rows(y: Float[Tensor, "R D"], by: Permutation) -> Float[Tensor, "T D"]:
    """`combine` without autograd."""
    if by.rows is None:
        return y.new_zeros(by.num_tokens, y.shape[1]).index_add_(0, by.tokens, y)
    return F.embedding_bag(by.rows, y, mode="sum")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Permutation) -> Tensor:
        ctx.by = by
        return x.index_select(0, by.tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return combine(grads[0], ctx.by), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, by: Permutation) -> Tensor:
        ctx.by = by
        return sum_rows(y, by)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather(grads[0], ctx.by), None
