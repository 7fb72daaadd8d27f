"""Rows of tokens to rows sorted by expert, and back."""

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

    R is N, or more with filler rows: ``order`` is N there, the token 0 and the combine weight 0, so
    that experts add nothing for them to any output or gradient.
    """

    order: Int[Tensor, "R"]
    tokens: Int[Tensor, "R"]
    rows: Int[Tensor, "T K"] | None
    num_tokens: int
    tokens_per_expert: Int[Tensor, "E"]  # filler rows included
    filled: bool

    def sort(self, per_assignment: Float[Tensor, "N"]) -> Float[Tensor, "R"]:
        """The values of assignments in the order of the rows, 0 for filler rows."""
        if self.filled:
            per_assignment = torch.cat([per_assignment, per_assignment.new_zeros(1)])
        return per_assignment.index_select(0, self.order)


def sort_by_expert(output: RouterOutput, fill: bool = False) -> Permutation:
    """The stable permutation that groups assignments by expert.

    ``fill`` adds filler rows so that experts get one of few numbers of rows. Small integers sort
    four times faster on CPU than int64, hence the cast.
    """
    small = torch.uint8 if output.num_experts <= 256 else torch.int16
    if output.num_experts > torch.iinfo(torch.int16).max:
        small = torch.int64
    order = torch.sort(output.expert_indices.to(small), stable=True).indices
    counts, tokens = output.tokens_per_expert, output.token_indices
    places = torch.arange(len(order), device=order.device)
    all_rows = order
    if fill:
        filled = _few_sizes(counts)
        before = (filled - counts).cumsum(0) - (filled - counts)  # filler rows of earlier experts
        places = places + before.repeat_interleave(counts)
        nothing = order.new_full((int(filled.sum()),), len(order))
        all_rows, counts = nothing.index_copy(0, places, order), filled
        tokens = torch.cat([tokens, tokens.new_zeros(1)])
    rows = None
    if output.top_k is not None:
        rows = torch.empty_like(order).scatter_(0, order, places).view(-1, output.top_k)
    tokens = tokens.index_select(0, all_rows)
    return Permutation(all_rows, tokens, rows, len(output.router_logits), counts, fill)


def _few_sizes(counts: Int[Tensor, "E"]) -> Int[Tensor, "E"]:
    """``counts`` rounded up: to multiples of 16 until 512, then to 16 sizes an octave."""
    step = (counts.clamp(min=256).double().log2().floor() - 4).exp2().long()
    return (counts + step - 1) // step * step


def gather(x: Float[Tensor, "T D"], by: Permutation) -> Float[Tensor, "R D"]:
    """The rows of ``x`` sorted by expert; its gradient is `combine`."""
    return _Gather.apply(x, by)


def combine(y: Float[Tensor, "R D"], by: Permutation) -> Float[Tensor, "T D"]:
    """For each token the sum of its rows; its gradient is `gather`."""
    return _Combine.apply(y, by)


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
        if by.rows is None:
            return y.new_zeros(by.num_tokens, y.shape[1]).index_add_(0, by.tokens, y)
        return F.embedding_bag(by.rows, y, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather(grads[0], ctx.by), None
