"""The fast path: the whole mixture as one operation, by the engine that suits its size."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from routerlab.core.checks import choice
from routerlab.core.protocols import Experts
from routerlab.core.routing import RouterOutput
from routerlab.dispatch.autograd import Autograd
from routerlab.ops.fused_swiglu import ENGINES, fused_swiglu
from routerlab.ops.permute import few_sizes, sort_by_expert

# Mean rows of an expert times D times F; `routerlab bench layer --shapes grid` measures both sides.
BLOCKS_FROM = 6_000_000  # in float32 on a CPU blocks are faster from here, and need half the memory
BF16_FROM = 3_000_000  # on a CPU bf16 products of smaller experts are slower than float32 ones

_TAKES = {
    "blocks": "computes on a CPU",
    "grouped": "takes float32, bf16 or fp16 whose rows are multiples of 16 bytes",
}
_HALF = (torch.bfloat16, torch.float16)
_GROUPED = (torch.float32, *_HALF)  # what F.grouped_mm takes, in rows of a multiple of 16 bytes


class Fused:
    """What `Loop` computes, with no operation of autograd for each expert.

    For `SwiGLU` experts one operation goes from tokens to sums: it saves the tokens and each row's
    gate and up, folds the combine weight into the hidden rows, and writes gradients where they
    belong. Other experts, and torch.compile, take the readable path (`Autograd`). Its gradients
    have no gradients: what needs second derivatives uses ``dispatch=autograd``.

    Args:
        engine: ``blocks`` (CPU: blocks of rows that fit the cache), ``grouped`` (grouped products),
            or ``auto``: on a CPU blocks where experts have enough to do in float32 (`BLOCKS_FROM`)
            and for types and widths that grouped products refuse, grouped elsewhere. ``auto`` also
            computes small experts in float32 under bf16 autocast on a CPU (`BF16_FROM`).
        recompute: gate and up are computed again in backward instead of kept: 2F numbers a row
            less memory for a third more forward products. Nothing is routed twice.

    Raises ValueError for an engine that does not take the experts, their types or their widths.
    """

    def __init__(self, engine: str = "auto", recompute: bool = False) -> None:
        choice("engine", engine, ("auto", *ENGINES))
        self.engine, self.recompute = engine, recompute

    def __call__(
        self, x: Float[Tensor, "T D"], output: RouterOutput, experts: Experts
    ) -> Float[Tensor, "T D"]:
        weights = getattr(experts, "swiglu_weights", None)
        if weights is None and self.engine != "auto":
            raise ValueError(
                f"engine={self.engine!r}: computes plain SwiGLU experts, not "
                f"{type(experts).__name__}; use dispatch=auto or autograd"
            )
        if weights is None or torch.compiler.is_compiling():
            return self._readable(x, output, experts)
        gate_up_proj, down_proj = weights
        engine, dtype = plan(x, gate_up_proj, len(output.expert_indices), self.engine)
        if engine is None:
            return self._readable(x, output, experts)
        # oneDNN builds a kernel for every new size of a bf16 product, 1 to 2 ms each
        fill = few_sizes if dtype in _HALF and x.device.type == "cpu" else None
        by = sort_by_expert(output, fill)
        combine_weights = output.combine_weights
        return fused_swiglu(
            x, combine_weights, gate_up_proj, down_proj, by, engine, dtype, self.recompute
        )

    def _readable(self, x: Tensor, output: RouterOutput, experts: Experts) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(Autograd(), x, output, experts, use_reentrant=False)
        return Autograd()(x, output, experts)


def plan(
    x: Tensor, gate_up_proj: Tensor, num_assignments: int, engine: str = "auto"
) -> tuple[str | None, torch.dtype]:
    """The engine, None where none takes these tensors, and the type of the products.

    Raises ValueError for types that do not go together, and for an ``engine`` other than ``auto``
    that does not take them.
    """
    num_experts, twice_d_ff, d_model = gate_up_proj.shape
    work = num_assignments / num_experts * d_model * (twice_d_ff // 2)
    device, dtype = x.device.type, x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        small = engine == "auto" and gate_up_proj.dtype == torch.float32 and work < BF16_FROM
        if device == "cpu" and small:
            dtype = torch.float32
    elif x.dtype != gate_up_proj.dtype:
        raise ValueError(
            f"tokens are {x.dtype} and experts {gate_up_proj.dtype}: without autocast they must be "
            "of one type"
        )
    aligned = all(n * dtype.itemsize % 16 == 0 for n in (d_model, twice_d_ff // 2))
    takes = {"blocks": device == "cpu", "grouped": dtype in _GROUPED and aligned}
    if engine == "auto":
        blocks = takes["blocks"] and dtype not in _HALF and work >= BLOCKS_FROM
        if takes["grouped"] and not blocks:
            return "grouped", dtype
        return "blocks" if takes["blocks"] else None, dtype
    if not takes[engine]:
        raise ValueError(
            f"engine={engine!r}: {_TAKES[engine]}, not {dtype} of d_model={d_model} and "
            f"d_ff={twice_d_ff // 2} on {device}; use engine='auto'"
        )
    return engine, dtype
