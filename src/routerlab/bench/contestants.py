"""The layers that are compared, with the same weights, and the proof that they are equal."""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from routerlab.core.protocols import Dispatch
from routerlab.diagnostics.collection import DiagnosticSums
from routerlab.diagnostics.expert_load import ExpertLoad
from routerlab.diagnostics.router_entropy import RouterEntropy
from routerlab.diagnostics.router_logits import RouterLogits
from routerlab.diagnostics.selection_margin import SelectionMargin
from routerlab.dispatch.fused import Fused
from routerlab.dispatch.loop import Loop
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.losses.router_z import RouterZLoss
from routerlab.moe.layer import DISPATCHES, DenseSwiGLU, MoE
from routerlab.routers.token_choice import TokenChoice

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"float32": 2e-5, "bf16": 0.05}  # largest difference over largest entry
# Tokens whose K-th and next logit are closer than this may be sent elsewhere by rounding alone (the
# router of transformers runs in bf16 under autocast): they are timed, but not compared.
MARGIN = {"float32": 1e-4, "bf16": 0.05}
RESULTS = ("y", "x.grad", "router.grad", "gate_up_proj.grad", "down_proj.grad")


class UnequalError(RuntimeError):
    """A contestant does not compute what the float64 loop computes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """``T,D,F,E,K``: tokens, d_model, d_ff of one expert, experts, top-k."""

    tokens: int
    d_model: int
    d_ff: int
    num_experts: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """The shape that five numbers with commas between them name."""
        if not re.fullmatch(r"\s*\d+(\s*,\s*\d+){4}\s*", text):
            raise ValueError(f"shape={text!r}: must be five whole numbers T,D,F,E,K")
        shape = cls(*map(int, text.split(",")))
        for name in cls.__slots__:
            if getattr(shape, name) < 1:
                raise ValueError(f"shape={text!r}: {name} must be at least 1")
        if not 2 <= shape.top_k <= shape.num_experts:
            raise ValueError(
                f"shape={text!r}: K={shape.top_k} must be from 2 (Mixtral divides the K weights by "
                f"their sum, so one weight has no gradient) to E={shape.num_experts}"
            )
        return shape

    def __str__(self) -> str:
        return ",".join(str(getattr(self, name)) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class Contestant:
    """A layer, as a function of tokens [T, D], and its router, gate-up and down weights."""

    forward: Callable[[Tensor], Tensor]
    weights: tuple[Tensor, ...]
    layer: Any = None  # ours

    def step(self, x: Tensor, dy: Tensor, autocast: bool = False) -> Tensor:
        """Forward and backward from fresh gradients; returns the output."""
        for leaf in (x, *self.weights):
            leaf.grad = None
        y = self.run(x, autocast)
        y.backward(dy)
        return y

    def run(self, x: Tensor, autocast: bool = False) -> Tensor:
        """The output in the type of ``x``, computed under bf16 autocast or as the weights are."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            y = self.forward(x)
        return y.to(x.dtype)


def reference_layer(shape: Shape, device: torch.device) -> MoE:
    """The layer whose weights every contestant gets; logits of unit scale for tokens of one."""
    router = partial(TokenChoice, top_k=shape.top_k, init_std=shape.d_model**-0.5)
    layer = MoE(shape.d_model, shape.d_ff, shape.num_experts, router, dispatch="loop")
    return layer.to(device)


def build_dense(shape: Shape, device: torch.device) -> Contestant:
    """The dense network of equal active FLOPs: K times the hidden units of an expert."""
    layer = DenseSwiGLU(shape.d_model, shape.d_ff * shape.top_k).to(device)
    return Contestant(layer, (layer.gate_up_proj.weight, layer.down_proj.weight))


def build_ours(layer: MoE, dispatch: Callable[[], Dispatch]) -> Contestant:
    """Our layer with one of its dispatches."""
    layer = deepcopy(layer)
    layer.dispatch = dispatch()
    experts: Any = layer.experts
    weights = (layer.router.gate.weight, experts.gate_up_proj, experts.down_proj)
    return Contestant(lambda x: layer(x)[0], weights, layer)


def build_watched(layer: MoE) -> Contestant:
    """Our layer with the default losses, forward and backward, and diagnostics on every step: more
    than training does, which computes diagnostics when they are logged.
    """
    contestant = build_ours(layer, Fused)
    losses = (LoadBalancingLoss(), RouterZLoss())
    diagnostics = [ExpertLoad(), RouterEntropy(), RouterLogits(), SelectionMargin()]

    def run(x: Tensor) -> Tensor:
        y, record = contestant.layer(x)
        sums = DiagnosticSums({type(one).__name__: one for one in diagnostics})
        sums.add({"layer": record})
        sums.values()
        return y + 0 * sum(loss(record) for loss in losses)  # adds their work and no gradient

    return replace(contestant, forward=run)


def build_transformers(layer: MoE, implementation: str) -> Contestant:
    """Mixtral's block of transformers with one of its experts implementations."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    theirs, experts = layer.router, layer.experts
    num_experts, d_model, d_ff = experts.down_proj.shape
    options: dict[str, Any] = {"experts_implementation": implementation}
    config = MixtralConfig(
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_local_experts=num_experts,
        num_experts_per_tok=theirs.top_k,
        **options,
    )
    block: Any = MixtralSparseMoeBlock(config).to(experts.down_proj.device)
    weights = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    sources = (theirs.gate.weight, experts.gate_up_proj, experts.down_proj)
    with torch.no_grad():
        for weight, source in zip(weights, sources, strict=True):
            weight.copy_(source)
    return Contestant(lambda x: block(x[None])[0], weights)


# batched_mm copies the weights for every token (100 times slower); deepgemm, sonicmoe need a GPU.
PATHS: dict[str, Callable[[MoE], Contestant]] = {
    **{name: partial(build_ours, dispatch=make) for name, make in DISPATCHES.items()},
    "recompute": partial(build_ours, dispatch=partial(Fused, recompute=True)),
    "watched": build_watched,
    "hf_grouped_mm": partial(build_transformers, implementation="grouped_mm"),
    "hf_eager": partial(build_transformers, implementation="eager"),
}


def results(contestant: Contestant, x: Tensor, dy: Tensor, autocast: bool = False) -> list[Tensor]:
    """The output and all gradients, named in `RESULTS`."""
    y = contestant.step(x, dy, autocast)
    grads = [leaf.grad for leaf in (x, *contestant.weights)]
    if any(grad is None for grad in grads):
        raise UnequalError("a gradient is missing")
    return [y.detach(), *[grad.clone() for grad in grads if grad is not None]]


def difference(found: list[Tensor], reference: list[Tensor]) -> tuple[float, str]:
    """The largest of max|a - b| / max|b| over all results, and where it is."""
    values = [
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30))
        for a, b in zip(found, reference, strict=True)
    ]
    # NaN compares false with everything: it must not pass for the smallest
    worst = max(range(len(values)), key=lambda i: (values[i] != values[i], values[i]))
    return values[worst], RESULTS[worst]


def check_equal(contestant: Contestant, layer: MoE, x: Tensor, dy: Tensor, dtype: str) -> float:
    """The difference from the float64 loop; `UnequalError` where it is above `TOLERANCE`.

    Checked in float32 and, where that is what will be timed, once more under autocast.
    """
    exact_layer = deepcopy(layer).double()
    exact = build_ours(exact_layer, Loop)
    worst = 0.0
    for name in dict.fromkeys(("float32", dtype)):
        tokens = clear_tokens(exact_layer, x, MARGIN[name]).requires_grad_()
        reference = results(exact, tokens.detach().double().requires_grad_(), dy.double())
        found = results(contestant, tokens, dy, autocast=name == "bf16")
        worst, place = difference(found, reference)
        if not worst <= TOLERANCE[name]:
            raise UnequalError(
                f"{place} differs from the float64 loop by {worst:.2g} of its largest entry in "
                f"{name}; at most {TOLERANCE[name]:g} is equal"
            )
    return worst


@torch.no_grad()
def clear_tokens(layer: MoE, x: Tensor, margin: float) -> Tensor:
    """``x`` with tokens whose choice hangs on less than ``margin`` replaced by others of ``x``."""
    top_k, num_experts = layer.router.top_k, layer.router.num_experts
    if top_k == num_experts:
        return x.detach().clone()
    logits = layer(x.double())[1].router_logits
    best = logits.topk(top_k + 1, dim=-1).values
    clear = (best[:, -2] - best[:, -1] > margin).nonzero().flatten()
    if not len(clear):
        raise UnequalError(f"no token is chosen by a margin of {margin:g}: nothing to compare")
    return x.detach()[clear[torch.arange(len(x), device=x.device) % len(clear)]]
