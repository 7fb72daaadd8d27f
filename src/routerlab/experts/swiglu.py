"""SwiGLU experts with stacked weights."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.ops.grouped_mm import grouped_mm

_BLOCK_SIZE = 2**18  # numbers of gate_up in a block: with its temporaries it fits a core's cache


class SwiGLU(nn.Module):
    r""":math:`W_{down}(\mathrm{silu}(W_{gate} x) \odot W_{up} x)` for each of E experts
    (Shazeer, arXiv 2002.05202).

    Weights are stored as Hugging Face stores them: ``gate_up_proj`` [E, 2F, D], gate rows first,
    and ``down_proj`` [E, D, F]. The combine weight multiplies the hidden row, which gives the same
    output and a cheaper gradient than weighting the output row.
    """

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__()
        if d_ff < 1:
            raise ValueError(f"d_ff={d_ff}: must be at least 1")
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * d_ff, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        nn.init.normal_(self.gate_up_proj, std=d_model**-0.5)
        nn.init.normal_(self.down_proj, std=d_ff**-0.5)

    def forward(
        self,
        x: Float[Tensor, "N D"],
        tokens_per_expert: Int[Tensor, "E"],
        combine_weights: Float[Tensor, "N"],
    ) -> Float[Tensor, "N D"]:
        """Weighted outputs of rows sorted by expert, ``tokens_per_expert`` rows for each."""
        gate_up = grouped_mm(x, self.gate_up_proj, tokens_per_expert)
        # torch.compile fuses the formula itself, and cannot trace the hand-written backward
        weigh = _weighted_swiglu if torch.compiler.is_compiling() else _WeightedSwiGLU.apply
        hidden = weigh(gate_up, combine_weights.to(gate_up.dtype))
        return grouped_mm(hidden, self.down_proj, tokens_per_expert)

    def expert(
        self, index: int, x: Float[Tensor, "n D"], combine_weights: Float[Tensor, "n"]
    ) -> Float[Tensor, "n D"]:
        """Weighted outputs of one expert."""
        gate, up = F.linear(x, self.gate_up_proj[index]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[index]) * combine_weights[:, None]


def _weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * weights[:, None]


def _differentiable_backward(gate_up: Tensor, weights: Tensor, grad: Tensor) -> tuple[Any, ...]:
    inputs = [t for t in (gate_up, weights) if t.requires_grad]
    hidden = _weighted_swiglu(gate_up, weights)
    found = iter(torch.autograd.grad(hidden, inputs, grad, create_graph=True))
    return tuple(next(found) if t.requires_grad else None for t in (gate_up, weights))


class _WeightedSwiGLU(torch.autograd.Function):
    """`_weighted_swiglu` that saves its inputs only, fills few fresh buffers and, on CPU, goes by
    blocks of rows that stay in the cache: those passes are bound by memory, not by arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        hidden = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        for rows, scale, out in _blocks(gate_up, weights, hidden):
            gate, up = rows.chunk(2, dim=-1)
            torch.ops.aten.silu.out(gate, out=out).mul_(up).mul_(scale[:, None])
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (d_hidden,), (gate_up, weights) = grads, ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            return _differentiable_backward(gate_up, weights, d_hidden)
        d_gate_up, d_weights = torch.empty_like(gate_up), torch.empty_like(weights)
        tensors = (gate_up, weights, d_hidden, d_gate_up, d_weights)
        for rows, scale, grad, d_rows, d_scale in _blocks(*tensors):
            gate, up = rows.chunk(2, dim=-1)
            d_gate, d_up = d_rows.chunk(2, dim=-1)
            buffer = F.silu(gate)
            torch.mul(buffer, grad, out=d_up)
            torch.linalg.vecdot(d_up, up, out=d_scale)
            d_up.mul_(scale[:, None])
            torch.mul(grad, up, out=buffer).mul_(scale[:, None])
            torch.ops.aten.silu_backward.grad_input(buffer, gate, grad_input=d_gate)
        return d_gate_up, d_weights


def _blocks(gate_up: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    tensors = (gate_up, *others)
    if gate_up.device.type != "cpu" or gate_up.numel() <= 2 * _BLOCK_SIZE:
        return [tensors]
    rows = max(1, _BLOCK_SIZE // gate_up.shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
