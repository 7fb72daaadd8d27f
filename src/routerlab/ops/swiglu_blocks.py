"""SwiGLU experts on a CPU: one block of rows that fits the cache after the other."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routerlab.ops.permute import Permutation, sum_rows
from routerlab.ops.swiglu import swiglu_rows, swiglu_rows_backward

BLOCK_SIZE = 2**18  # numbers of gate and up in a block: more leave the cache, fewer cost calls


class _Memory(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}


_memory = _Memory()


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring rows: whole experts with their ``sizes`` in rows, or a piece of a large one,
    which is not the ``first`` where earlier rows of the expert are in the block before.
    """

    experts: list[int]
    sizes: list[int]
    first: bool = True


def cut(tokens_per_expert: list[int], block_rows: int) -> list[Block]:
    """Rows sorted by expert in blocks of about ``block_rows``; experts without rows are in none."""
    blocks: list[Block] = []
    experts: list[int] = []
    sizes: list[int] = []
    for expert, count in enumerate(tokens_per_expert):
        if sizes and sum(sizes) + count > block_rows * 5 // 4:
            blocks.append(Block(experts, sizes))
            experts, sizes = [], []
        if count > block_rows * 3 // 2:
            pieces = -(-count // block_rows)
            ends = [count * i // pieces for i in range(pieces + 1)]
            for i in range(pieces):
                blocks.append(Block([expert], [ends[i + 1] - ends[i]], first=not i))
        elif count:
            experts.append(expert)
            sizes.append(count)
    return [*blocks, Block(experts, sizes)] if sizes else blocks


def forward(
    x: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, by: Permutation, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """The weighted sums of tokens' experts [T, D], and what is kept of each block for backward:
    gate and up.
    """
    d_ff, d_model = gate_up_proj.shape[1] // 2, x.shape[1]
    # summed in one go: a scatter for each block waits for all threads several times
    y = x.new_empty(len(by.tokens), d_model)
    to_gate_up, to_out = gate_up_proj.transpose(1, 2).unbind(), down_proj.transpose(1, 2).unbind()
    blocks, most = _blocks(by, weights, d_ff)
    rows, hidden, spare = _scratch(x, most, d_model, d_ff, 0 if keep else 2 * d_ff)
    gate_ups: list[Tensor] = []
    start = 0
    for block, tokens, scale in blocks:
        n = len(tokens)
        torch.index_select(x, 0, tokens, out=rows.resize_(n, d_model))
        gate_up = x.new_empty(n, 2 * d_ff) if keep else spare.resize_(n, 2 * d_ff)
        _multiply(rows, to_gate_up, block, gate_up)
        swiglu_rows(gate_up, scale, hidden.resize_(n, d_ff))
        _multiply(hidden, to_out, block, y[start : start + n])
        if keep:
            gate_ups.append(gate_up)
        start += n
    return sum_rows(y, by), gate_ups


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
    """Gradients of tokens, rows' weights and both stacks of weights (these in at least float32);
    None for those that are not ``wanted``. Without ``gate_ups`` gate and up are computed again.
    """
    d_ff, d_model = gate_up_proj.shape[1] // 2, x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_empty(len(by.tokens), d_model) if wanted[0] else None
    d_gate_up_proj = _gradient_of(gate_up_proj, by, wide) if wanted[2] else None
    d_down_proj = _gradient_of(down_proj, by, wide) if wanted[3] else None
    into_gate_up = None if d_gate_up_proj is None else d_gate_up_proj.unbind()
    into_down = None if d_down_proj is None else d_down_proj.unbind()
    to_x, to_hidden = gate_up_proj.unbind(), down_proj.unbind()
    d_weights = torch.empty_like(weights)
    blocks, most = _blocks(by, weights, d_ff)
    rows, grads, hidden, d_hidden, d_gate_up, spare = _scratch(
        x, most, d_model, d_model, d_ff, d_ff, 2 * d_ff, 0 if gate_ups else 2 * d_ff
    )
    start = 0
    for i, (block, tokens, scale) in enumerate(blocks):
        n = len(tokens)
        torch.index_select(dy, 0, tokens, out=grads.resize_(n, d_model))
        if into_gate_up is not None or not gate_ups:
            torch.index_select(x, 0, tokens, out=rows.resize_(n, d_model))
        if gate_ups:
            gate_up = gate_ups[i]
        else:
            gate_up = spare.resize_(n, 2 * d_ff)
            _multiply(rows, [w.T for w in to_x], block, gate_up)
        _multiply(grads, to_hidden, block, d_hidden.resize_(n, d_ff))
        d_gate_up.resize_(n, 2 * d_ff)
        d_scale = d_weights[start : start + n]
        swiglu_rows_backward(gate_up, scale, d_hidden, d_gate_up, d_scale, hidden.resize_(n, d_ff))
        if into_down is not None:
            _multiply_over_rows(grads, hidden, block, into_down)
        if into_gate_up is not None:
            _multiply_over_rows(d_gate_up, rows, block, into_gate_up)
        if dx is not None:
            _multiply(d_gate_up, to_x, block, dx[start : start + n])
        start += n
    dx = None if dx is None else sum_rows(dx, by)
    return dx, d_weights, d_gate_up_proj, d_down_proj


def _blocks(
    by: Permutation, weights: Tensor, d_ff: int
) -> tuple[Iterable[tuple[Block, Tensor, Tensor]], int]:
    """Each block with the tokens of its rows and their weights; and the rows of the largest."""
    blocks = cut(by.tokens_per_expert.tolist(), max(64, BLOCK_SIZE // (2 * d_ff)))
    sizes = [sum(block.sizes) for block in blocks]
    parts = zip(blocks, by.tokens.split(sizes), weights.split(sizes), strict=True)
    return parts, max(sizes, default=0)


def _scratch(x: Tensor, rows: int, *widths: int) -> list[Tensor]:
    """Buffers that every block shrinks to its own rows, in memory that this thread keeps: fresh
    memory is mapped in page by page, which takes longer than filling it.
    """
    kept = _memory.buffers
    aligned = 64 // x.element_size()  # a cache line
    sizes = [-(-rows * width // aligned) * aligned for width in widths]
    if (buffer := kept.get(x.dtype)) is None or len(buffer) < sum(sizes):
        with torch.inference_mode(False):  # what is made in that mode can only be written in it
            buffer = kept[x.dtype] = x.new_empty(sum(sizes))
    parts = buffer[: sum(sizes)].split(sizes)
    return [part[: rows * w].view(rows, w) for part, w in zip(parts, widths, strict=True)]


def _multiply(rows: Tensor, weights: Sequence[Tensor], block: Block, out: Tensor) -> None:
    """``rows of e @ weights[e]`` for each expert of the block."""
    if len(block.experts) == 1:
        torch.mm(rows, weights[block.experts[0]], out=out)
        return
    parts = zip(block.experts, rows.split(block.sizes), out.split(block.sizes), strict=True)
    for expert, part, into in parts:
        torch.mm(part, weights[expert], out=into)


def _multiply_over_rows(left: Tensor, right: Tensor, block: Block, into: Sequence[Tensor]) -> None:
    """``left of e.T @ right of e``, added to ``into[e]`` (which a first piece finds empty)."""
    parts = zip(block.experts, left.T.split(block.sizes, 1), right.split(block.sizes), strict=True)
    for expert, a, b in parts:
        if into[expert].dtype != b.dtype:  # the product in bf16, the sum in float32
            into[expert].copy_(a @ b) if block.first else into[expert].add_(a @ b)
        elif block.first:
            torch.mm(a, b, out=into[expert])
        else:
            into[expert].addmm_(a, b)


def _gradient_of(weight: Tensor, by: Permutation, dtype: torch.dtype) -> Tensor:
    """Room for a gradient: zero for experts without rows, whose products nobody writes."""
    found = torch.empty_like(weight, dtype=dtype)
    idle = (by.tokens_per_expert == 0).nonzero().flatten()
    return found.index_fill_(0, idle, 0.0) if len(idle) else found
