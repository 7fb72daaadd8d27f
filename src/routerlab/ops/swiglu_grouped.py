"""SwiGLU experts with one grouped product a weight: for GPUs, and for small experts on a CPU."""

import torch
from torch import Tensor
from torch.nn import functional as F

from routerlab.ops.permute import Permutation, sum_rows
from routerlab.ops.swiglu import swiglu_rows, swiglu_rows_backward


def forward(
    x: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, by: Permutation, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """The weighted sums of tokens' experts [T, D], and what is kept for backward: gate and up."""
    ends = by.tokens_per_expert.cumsum(0, dtype=torch.int32)
    gate_up = F.grouped_mm(x.index_select(0, by.tokens), gate_up_proj.transpose(1, 2), offs=ends)
    hidden = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    swiglu_rows(gate_up, weights, hidden)
    gate_ups = [gate_up] if keep else []
    del gate_up
    return sum_rows(F.grouped_mm(hidden, down_proj.transpose(1, 2), offs=ends), by), gate_ups


def backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    by: Permutation,
    gate_ups: list[Tensor],
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of tokens, rows' weights and both stacks of weights; None for those that are not
    ``wanted``. Without ``gate_ups`` gate and up are computed again.
    """
    ends = by.tokens_per_expert.cumsum(0, dtype=torch.int32)
    if gate_ups:
        gate_up = gate_ups[0]
    else:
        rows = x.index_select(0, by.tokens)
        gate_up = F.grouped_mm(rows, gate_up_proj.transpose(1, 2), offs=ends)
        del rows
    grads = dy.index_select(0, by.tokens)
    d_hidden = F.grouped_mm(grads, down_proj, offs=ends)
    d_gate_up, d_weights = torch.empty_like(gate_up), torch.empty_like(weights)
    hidden = torch.empty_like(d_hidden)
    swiglu_rows_backward(gate_up, weights, d_hidden, d_gate_up, d_weights, hidden)
    del gate_up, d_hidden
    d_down_proj = F.grouped_mm(grads.T, hidden, offs=ends) if wanted[3] else None
    del grads, hidden
    dx = d_gate_up_proj = None
    if wanted[2]:
        d_gate_up_proj = F.grouped_mm(d_gate_up.T, x.index_select(0, by.tokens), offs=ends)
    if wanted[0]:
        dx = sum_rows(F.grouped_mm(d_gate_up, gate_up_proj, offs=ends), by)
    return dx, d_weights, d_gate_up_proj, d_down_proj
