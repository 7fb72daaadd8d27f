"""A mixture of SwiGLU experts as one operation of autograd: from tokens to weighted sums."""

from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from routerlab.ops import swiglu_blocks, swiglu_grouped
from routerlab.ops.permute import Permutation

ENGINES: dict[str, ModuleType] = {"blocks": swiglu_blocks, "grouped": swiglu_grouped}


def fused_swiglu(
    x: Float[Tensor, "T D"],
    combine_weights: Float[Tensor, "N"],
    gate_up_proj: Float[Tensor, "E H D"],
    down_proj: Float[Tensor, "E D F"],
    by: Permutation,
    engine: str,
    dtype: torch.dtype,
    recompute: bool = False,
) -> Float[Tensor, "T D"]:
    """For each token the weighted sum of its experts' outputs, in the type of ``x``.

    Saved for backward are tokens and weights in ``dtype``, in which products are computed, and gate
    and up of each row (H = 2F; ``recompute``: not these, they are computed again). Gradients of
    weights are summed in float32. It can be differentiated once.
    """
    keep = torch.is_grad_enabled() and not recompute
    args = (x, combine_weights, gate_up_proj, down_proj, by, ENGINES[engine], dtype, keep)
    return _FusedSwiGLU.apply(*args)


class _FusedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        combine_weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        by: Permutation,
        engine: ModuleType,
        dtype: torch.dtype,
        keep: bool,
    ) -> Tensor:
        tensors = (x, combine_weights, gate_up_proj, down_proj)
        ctx.by, ctx.engine, ctx.types = by, engine, [t.dtype for t in tensors]
        used = [t.to(dtype) for t in (x, by.sort(combine_weights), gate_up_proj, down_proj)]
        y, gate_ups = engine.forward(*used, by, keep)
        ctx.save_for_backward(*used, *gate_ups)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable  # whose type is not that of a method
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weights, gate_up_proj, down_proj, *gate_ups = ctx.saved_tensors
        used = (grads[0].to(x.dtype), x, weights, gate_up_proj, down_proj)
        found = list(ctx.engine.backward(*used, ctx.by, gate_ups, ctx.needs_input_grad[:4]))
        found[1] = ctx.by.unsort(found[1])
        cast = [g if g is None else g.to(t) for g, t in zip(found, ctx.types, strict=True)]
        return (*cast, None, None, None, None)
