"""The element-wise part of SwiGLU experts, with the combine weight folded in."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_BLOCK_SIZE = 2**18  # numbers of gate_up in a block: with its temporaries it fits a core's cache


def weighted_swiglu(
    gate_up: Float[Tensor, "N H"], weights: Float[Tensor, "N"]
) -> Float[Tensor, "N F"]:
    """``silu(gate) * up * weight`` of rows whose first half is gate, with derivatives of any order
    (Shazeer, arXiv 2002.05202, equation 6).

    Outside torch.compile, which fuses the formula itself, only the arguments are saved.
    """
    if torch.compiler.is_compiling():  # and cannot trace the hand-written backward
        return _formula(gate_up, weights)
    return _WeightedSwiGLU.apply(gate_up, weights)


def swiglu_rows(gate_up: Tensor, weights: Tensor, hidden: Tensor) -> None:
    """``hidden`` [N, F] of rows, by blocks that stay in the cache on a CPU: these passes are bound
    by memory, not by arithmetic.
    """
    for rows, scale, out in _blocks(gate_up, weights, hidden):
        gate, up = rows.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=out).mul_(up).mul_(scale[:, None])


def swiglu_rows_backward(
    gate_up: Tensor,
    weights: Tensor,
    d_hidden: Tensor,
    d_gate_up: Tensor,
    d_weights: Tensor,
    hidden: Tensor | None = None,
) -> None:
    """The gradients of rows into ``d_gate_up`` and ``d_weights``, from ``d_hidden``, and once more
    ``hidden`` into a buffer of its shape where one is given.
    """
    tensors = (gate_up, weights, d_hidden, d_gate_up, d_weights)
    tensors += (torch.empty_like(d_hidden) if hidden is None else hidden,)
    for rows, scale, grad, d_rows, d_scale, silu in _blocks(*tensors):
        gate, up = rows.chunk(2, dim=-1)
        d_gate, d_up = d_rows.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=silu)
        torch.mul(silu, grad, out=d_up)
        torch.linalg.vecdot(d_up, up, out=d_scale)
        d_up.mul_(scale[:, None])
        torch.mul(grad, up, out=d_gate).mul_(scale[:, None])
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        if hidden is not None:
            silu.mul_(up).mul_(scale[:, None])


def _formula(gate_up: Tensor, weights: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * weights[:, None]


def _differentiable_backward(gate_up: Tensor, weights: Tensor, grad: Tensor) -> tuple[Any, ...]:
    inputs = [t for t in (gate_up, weights) if t.requires_grad]
    hidden = _formula(gate_up, weights)
    found = iter(torch.autograd.grad(hidden, inputs, grad, create_graph=True))
    return tuple(next(found) if t.requires_grad else None for t in (gate_up, weights))


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        hidden = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        swiglu_rows(gate_up, weights, hidden)
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate_up, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            return _differentiable_backward(gate_up, weights, grads[0])
        d_gate_up, d_weights = torch.empty_like(gate_up), torch.empty_like(weights)
        swiglu_rows_backward(gate_up, weights, grads[0], d_gate_up, d_weights)
        return d_gate_up, d_weights


def _blocks(gate_up: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    tensors = (gate_up, *others)
    if gate_up.device.type != "cpu" or gate_up.numel() <= 2 * _BLOCK_SIZE:
        return [tensors]
    rows = max(1, _BLOCK_SIZE // gate_up.shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
