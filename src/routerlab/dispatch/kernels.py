"""Kernels of other packages for the whole mixture: loaded when chosen, proved before they are used.

None of these packages is a dependency of routerlab. Each is reached through its public functions
and gets routerlab's own weights; what it needs is in `BACKENDS`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from routerlab.core.checks import choice
from routerlab.core.routing import RouterOutput, count_experts
from routerlab.ops.kernel_proof import TOLERANCE, Kernel, Kind, differences, readable


@dataclass(frozen=True)
class Backend:
    """A package with such kernels.

    Attributes:
        package: the name that it is imported by.
        load: imports it and gives its kernel.
        install: how to get it.
        dtypes: what it computes in.
        capability: the least compute capability of the GPU.
    """

    package: str
    load: Callable[[], Kernel]
    install: str
    dtypes: tuple[torch.dtype, ...]
    capability: tuple[int, int]


class Kernels:
    """The mixture of plain SwiGLU experts by the kernels of another package.

    On the first use with a type, device and sizes (E, D, F, K) the kernel is run beside
    `routerlab.dispatch.autograd`'s operations on a random problem of that kind, in which one expert
    takes every token and another none; output and all gradients must agree (`ops.kernel_proof`).
    That takes the memory of five layers' experts, once. Nothing is replaced where it fails: a
    missing package is an error when the object is made, the rest at that first use.

    Every token must have exactly K experts (no padding, no capacity, no top-p), and gradients of
    gradients are not to be had.

    Args:
        backend: a name in `BACKENDS`.

    Raises:
        ValueError: an unknown name, or a package that cannot be imported.
    """

    def __init__(self, backend: str) -> None:
        choice("dispatch.backend", backend, tuple(BACKENDS))
        self.backend = backend
        if not (torch.cuda.is_available() or _interpreted()):
            raise ValueError(
                f"dispatch.backend={backend!r}: needs a GPU, and torch sees no CUDA; "
                "use dispatch=autograd"
            )
        try:
            self._kernel = BACKENDS[backend].load()
        except ImportError as error:
            raise ValueError(
                f"dispatch.backend={backend!r}: it cannot be loaded here ({error}); it needs "
                f"{BACKENDS[backend].install}. dispatch=autograd runs everywhere"
            ) from error
        self._proved: set[Kind] = set()

    @torch.compiler.disable
    def __call__(
        self, x: Float[Tensor, "T D"], output: RouterOutput, experts: Any
    ) -> Float[Tensor, "T D"]:
        """The weighted sum of each token's experts.

        Raises:
            ValueError: something that the kernel does not do, or does wrongly.
        """
        gate_up, down = self._weights(experts)
        if output.top_k is None:
            raise ValueError(
                f"dispatch.backend={self.backend!r}: needs exactly K experts for every token, and "
                "this record has padding, a capacity or a varying number; use dispatch=autograd"
            )
        dtype = self._dtype(x, gate_up, down)
        picks = output.expert_indices.view(-1, output.top_k)
        weights = output.combine_weights.view(-1, output.top_k)
        self._check_device(x.device, dtype)
        with torch.autocast(x.device.type, enabled=False):
            kind = Kind(dtype, x.device, len(gate_up), x.shape[1], down.shape[2], output.top_k)
            if kind not in self._proved:
                self._prove(kind)
                self._proved.add(kind)
            run = self._kernel if len(x) else readable
            y = run(x.to(dtype), gate_up.to(dtype), down.to(dtype), picks, weights.to(dtype))
            return y.to(x.dtype)

    def _weights(self, experts: Any) -> tuple[Tensor, Tensor]:
        weights = getattr(experts, "swiglu_weights", None)
        if weights is None:
            raise ValueError(
                f"dispatch.backend={self.backend!r}: computes plain SwiGLU experts, not "
                f"{type(experts).__name__}; use dispatch=autograd"
            )
        return weights

    def _dtype(self, x: Tensor, *weights: Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        types = {tensor.dtype for tensor in (x, *weights)}
        if len(types) > 1:
            names = ", ".join(sorted(map(str, types)))
            raise ValueError(f"dispatch.backend={self.backend!r}: mixed types {names}")
        return x.dtype

    def _check_device(self, device: torch.device, dtype: torch.dtype) -> None:
        backend, name = BACKENDS[self.backend], f"dispatch.backend={self.backend!r}"
        if dtype not in backend.dtypes:
            raise ValueError(
                f"{name}: computes in {', '.join(map(str, backend.dtypes))}, not in {dtype}; "
                "trainer.precision=bf16-mixed gives bfloat16"
            )
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < backend.capability:
            needs = ".".join(map(str, backend.capability))
            raise ValueError(f"{name}: needs a GPU of compute capability {needs} or more")
        if device.type != "cuda" and not _interpreted():
            raise ValueError(f"{name}: needs a CUDA device, and the tokens are on {device.type}")

    def _prove(self, kind: Kind) -> None:
        try:
            wrong = differences(self._kernel, kind)
        except Exception as error:  # whatever a compiler of kernels may raise
            raise ValueError(
                f"dispatch.backend={self.backend!r}: fails for {kind} ({error}); use "
                "dispatch=autograd"
            ) from error
        if wrong:
            raise ValueError(
                f"dispatch.backend={self.backend!r}: is wrong for {kind}: {', '.join(wrong)}; use "
                "dispatch=autograd"
            )


def _interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on a CPU: for tests, slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# -- the packages ---------------------------------------------------------------------------------


def _liger() -> Kernel:
    from liger_kernel.ops import LigerFusedMoEFunction  # type: ignore[import-not-found]

    def run(x: Tensor, gate_up: Tensor, down: Tensor, picks: Tensor, weights: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x, gate_up, down, picks.int(), weights)

    return run


def _scattermoe() -> Kernel:
    import scattermoe  # type: ignore[import-not-found]

    def run(x: Tensor, gate_up: Tensor, down: Tensor, picks: Tensor, weights: Tensor) -> Tensor:
        scattermoe.kernels.ops.ALLOW_TF32 = torch.get_float32_matmul_precision() != "highest"
        top_k, flat = picks.shape[1], picks.flatten()
        experts, places = torch.sort(flat, stable=True)
        plan = experts, places, count_experts(flat, len(gate_up)).cumsum(0)
        product = scattermoe.parallel_linear
        wide = product(x, gate_up.transpose(1, 2), top_k, *plan, grouped_out=True)
        gate, up = wide.chunk(2, dim=-1)
        # weighted here, not by its `gates`, whose backward writes over what was saved
        hidden = F.silu(gate) * up * weights.flatten().index_select(0, places)[:, None]
        y = product(hidden, down.transpose(1, 2), 1, *plan, grouped_in=True)
        return y.view(len(x), top_k, -1).sum(1)

    return run


def _sonicmoe() -> Kernel:
    # transformers' loader knows which builds of the kernel go with which GPU and packages
    from transformers.integrations.sonicmoe import is_sonicmoe_loadable, load_sonicmoe_kernel

    is_sonicmoe_loadable(raise_error=True)
    sonic = load_sonicmoe_kernel()

    def run(x: Tensor, gate_up: Tensor, down: Tensor, picks: Tensor, weights: Tensor) -> Tensor:
        tokens = torch.arange(len(x), device=x.device, dtype=torch.int32)
        return sonic.moe_general_routing_inputs(
            x,
            weights.flatten(),
            tokens.repeat_interleave(picks.shape[1], output_size=picks.numel()),
            picks.flatten().int(),
            gate_up.permute(1, 2, 0),
            None,
            down.permute(1, 2, 0),
            None,
            E=len(gate_up),
            activation_type=sonic.activation_type_enum.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,  # gate rows first, then up
            stream_id=None,
        )[0]

    return run


_HALF = (torch.bfloat16, torch.float16)
BACKENDS = {
    "liger": Backend(
        "liger_kernel",
        _liger,
        "`pip install liger-kernel` (0.8.5 or later, with Triton)",
        (*TOLERANCE,),
        (8, 0),
    ),
    "scattermoe": Backend(
        "scattermoe",
        _scattermoe,
        "github.com/shawntan/scattermoe, installed from source (0.3, with Triton)",
        (*TOLERANCE,),
        (8, 0),
    ),
    "sonicmoe": Backend(
        "kernels",
        _sonicmoe,
        "`pip install kernels nvidia-cutlass-dsl` and a Hopper GPU",
        _HALF,
        (9, 0),
    ),
}
