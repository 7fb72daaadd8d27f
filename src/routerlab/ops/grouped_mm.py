"""One matrix product per expert, in one call."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

_ROW_BYTES = 16  # F.grouped_mm wants every row to be a multiple of this


def grouped_mm(
    x: Float[Tensor, "N A"], weight: Float[Tensor, "E C A"], tokens_per_expert: Int[Tensor, "E"]
) -> Float[Tensor, "N C"]:
    """``x[rows of expert e] @ weight[e].T`` for rows sorted by expert.

    Under autocast both sides are cast by hand, since autocast does not know the op. Types and
    widths that ``F.grouped_mm`` refuses (float64, rows not a multiple of 16 bytes) go through a
    loop with the same result. Under ``torch.compile``, which knows ``F.grouped_mm`` in bfloat16
    only, anything else is one opaque operation of the graph.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    supported = _supported(x, *weight.shape[1:])
    if torch.compiler.is_compiling() and not (supported and x.dtype == torch.bfloat16):
        return _product(x, weight, ends)
    if not supported:
        # unbind, not weight[e]: each index would make a gradient as large as the whole stack
        parts = zip(x.split(tokens_per_expert.tolist()), weight.unbind(0), strict=True)
        return torch.cat([rows @ w.T for rows, w in parts])
    return _Contiguous.apply(F.grouped_mm(x, weight.transpose(1, 2), offs=ends))


def _supported(x: Tensor, *widths: int) -> bool:
    aligned = all(n * x.element_size() % _ROW_BYTES == 0 for n in widths)
    return aligned and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


class _Contiguous(torch.autograd.Function):
    """The identity; makes an expanded gradient (of ``y.sum()``) contiguous, as grouped_mm needs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


# -- for torch.compile ----------------------------------------------------------------------------


@torch.library.custom_op("routerlab::grouped_mm", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``x[rows of expert e] @ weight[e].T`` [N, C], for weights [E, C, A]."""
    if not len(x):
        return x.new_empty(0, weight.shape[1])
    x = x.contiguous()
    if _supported(x, *weight.shape[1:]):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    parts = zip(_by_expert(x, ends), weight.unbind(0), strict=True)
    return torch.cat([rows @ w.T for rows, w in parts])


@torch.library.custom_op("routerlab::grouped_outer", mutates_args=())
def _outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """``a[rows of expert e].T @ b[rows of expert e]`` [E, C, A]: the gradient of the weights."""
    if not len(a):
        return a.new_zeros(len(ends), a.shape[1], b.shape[1])
    a, b = a.contiguous(), b.contiguous()
    if _supported(a, a.shape[1], b.shape[1]):
        return F.grouped_mm(a.T, b, offs=ends)
    parts = zip(_by_expert(a, ends), _by_expert(b, ends), strict=True)
    return torch.stack([left.T @ right for left, right in parts])


def _by_expert(rows: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    return rows.tensor_split(ends[:-1].cpu().long())


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    dx = _product(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    return dx, _outer(grad, x, ends) if ctx.needs_input_grad[1] else None, None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    (a, b, ends), grad = ctx.saved_tensors, grad.contiguous()
    da = _product(b, grad, ends) if ctx.needs_input_grad[0] else None
    return da, _product(a, grad.transpose(1, 2), ends) if ctx.needs_input_grad[1] else None, None


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(ends.shape[0], a.shape[1], b.shape[1])


_product.register_autograd(_product_backward, setup_context=_keep)
_outer.register_autograd(_outer_backward, setup_context=_keep)
