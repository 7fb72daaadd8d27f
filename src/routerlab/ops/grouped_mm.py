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
    loop with the same result.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if not _supported(x, weight):
        # unbind, not weight[e]: each index would make a gradient as large as the whole stack
        parts = zip(x.split(tokens_per_expert.tolist()), weight.unbind(0), strict=True)
        return torch.cat([rows @ w.T for rows, w in parts])
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    return _Contiguous.apply(F.grouped_mm(x, weight.transpose(1, 2), offs=ends))


def _supported(x: Tensor, weight: Tensor) -> bool:
    aligned = all(n * x.element_size() % _ROW_BYTES == 0 for n in weight.shape[1:])
    return aligned and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


class _Contiguous(torch.autograd.Function):
    """The identity; makes an expanded gradient (of ``y.sum()``) contiguous, as grouped_mm needs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()
