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
    """

    order: Int[Tensor, "N"]
    tokens: Int[Tensor, "N"]
    rows: Int[Tensor, "T K"] | None
    num_tokens: int


def sort_by_expert(output: RouterOutput) -> Permutation:
    """The stable permutation that groups assignments by expert.

    Small integers sort four times faster on CPU than int64, hence the cast.
    """
    small = torch.uint8 if output.num_experts <= 256 else torch.int16
    if output.num_experts > torch.iinfo(torch.int16).max:
        small = torch.int64
    order = torch.sort(output.expert_indices.to(small), stable=True).indices
    rows = None
    if output.top_k is not None:
        places = torch.arange(len(order), device=order.device)
        rows = torch.empty_like(order).scatter_(0, order, places).view(-1, output.top_k)
    tokens = output.token_indices.index_select(0, order)
    return Permutation(order, tokens, rows, len(output.router_logits))


def gather(x: Float[Tensor, "T D"], by: Permutation) -> Float[Tensor, "N D"]:
    """The rows of ``x`` sorted by expert; its gradient is `combine`."""
    return _Gather.apply(x, by)


def combine(y: Float[Tensor, "N D"], by: Permutation) -> Float[Tensor, "T D"]:
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
