"""Routed blocks of transformers' models: finding them, listening to their routers, replacing them.

Nothing here changes the name of a weight, unless a router is replaced.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from routerlab.adapters.state import RoutingState
from routerlab.backbones.hugging_face_experts import HuggingFaceExperts
from routerlab.backbones.hugging_face_laws import law_of
from routerlab.balancers.expert_bias import ExpertBias
from routerlab.core.layers import layer_number
from routerlab.core.routing import RouterOutput, RoutingContext

_ROUTER = re.compile("top_?k_?router", re.IGNORECASE)
_TELLING = re.compile("router|experts", re.IGNORECASE)  # of class names: a mixture of some kind


@dataclass(frozen=True)
class RoutedLayer:
    """A routed block as objectives, losses and plug-ins see it."""

    router: Any
    experts: HuggingFaceExperts


@dataclass(frozen=True)
class RoutedBlock:
    """A block that holds ``experts`` beside a router, which is its ``attribute``."""

    module: Any
    attribute: str
    layer: int  # number in the model

    @property
    def router(self) -> Any:
        """The block's router."""
        return getattr(self.module, self.attribute)


def routed_blocks(model: nn.Module) -> dict[str, RoutedBlock]:
    """The routed blocks of a causal language model, in the order of depth, by the names of their
    records: blocks that have ``experts`` with a number of them, and one child whose class name
    holds TopKRouter. Raises ValueError for a dense model, and for mixtures of another build.
    """
    found: list[RoutedBlock] = []
    for path, block in model.named_modules():
        if hasattr(getattr(block, "experts", None), "num_experts"):
            children = block.named_children()
            names = [name for name, child in children if _ROUTER.search(type(child).__name__)]
            found += [RoutedBlock(block, name, layer_number(path)) for name in names]
    if not found:
        raise ValueError(_nothing_found(model))
    layers: Any = model.config
    digits = max(2, len(str(layers.get_text_config().num_hidden_layers - 1)))
    return {f"layers.{block.layer:0{digits}d}.moe": block for block in found}


def _nothing_found(model: nn.Module) -> str:
    name = type(model).__name__
    classes = {type(module).__name__ for module in model.modules()}
    telling = sorted(filter(_TELLING.search, classes))
    if not telling:
        return f"{name}: has no mixture of experts; make one with `routerlab upcycle`"
    return (
        f"{name}: a mixture of experts of a family that is not known here. Looked for blocks with "
        "`experts` that have num_experts, beside one router whose class name holds TopKRouter; "
        f"found {', '.join(telling)}"
    )


class NativeRouter(nn.Module):
    """A router of transformers as it is, and its record of each pass.

    Logits pass through ``gate``, in float32: what a forward hook there makes of them is chosen from
    by the family's own law, with gradient. As long as no hook changes them the block gets what it
    would get without us, bit for bit.

    Args:
        source: the router, which stays in its block.
        state: where records go, and where the padding of a pass is known.
        name: of the record.
    """

    causal = True

    def __init__(self, source: nn.Module, state: RoutingState, name: str) -> None:
        super().__init__()
        self.source: Any = source
        self.gate = PassThrough(source)
        self.state, self.name, self.law = state, name, law_of(source, name)
        source.register_forward_hook(self._listen)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.source.weight)

    @property
    def top_k(self) -> int:
        """K."""
        return self.source.top_k

    @property
    def score_fn(self) -> str:
        """What scores its experts: ``softmax`` or ``sigmoid``."""
        return "sigmoid" if "sigmoid" in self.law.name else "softmax"

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of these tokens; the padding of ``context.valid`` leaves it."""
        logits, weights, experts = self.source(x)
        valid = None if context is None else context.valid
        return self._record_of(logits, weights, experts, valid)

    def keep_float32(self) -> None:
        """Weights and logits are in float32 from now on, whatever the rest of the model is in."""
        if self.source.weight.dtype != torch.float32:
            self.source.float()
            self.source.register_forward_pre_hook(_in_float32)

    def _listen(self, source: Any, args: tuple, output: tuple) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, experts = output
        passing = logits.float()
        edited = self.gate(passing)
        if edited is not passing:
            chosen, experts = self.law.select(source, edited)
            logits, weights = edited.to(logits.dtype), chosen.to(weights.dtype)
        context = self.state.current
        valid = None if context is None else context.valid
        self.state.keep(self.name, self._record_of(edited, weights, experts, valid))
        return logits, weights, experts

    def _record_of(
        self, logits: Tensor, weights: Tensor, experts: Tensor, valid: Tensor | None
    ) -> RouterOutput:
        logits = logits.float()
        probs = self.law.probs(logits)
        return RouterOutput.from_top_k(logits, probs, experts, weights.float(), valid=valid)


class PassThrough(nn.Module):
    """What the logits of a native router go through: the identity, for hooks to change. Its
    ``weight`` [E, D] is the router's.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source: Any = source

    @property
    def weight(self) -> Tensor:
        """[E, D]."""
        return self.source.weight

    def forward(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """The logits."""
        return logits


def _in_float32(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in args)


class RouterInBlock(nn.Module):
    """One of our routers in the place of a block's own: returns logits, combine weights and, where
    transformers passes indices on, the record.
    """

    def __init__(self, router: nn.Module, state: RoutingState, name: str, layer: int) -> None:
        super().__init__()
        self.router, self.state, self.name, self.layer = router, state, name, layer

    def forward(self, hidden: Float[Tensor, "*batch D"]) -> tuple[Tensor, Tensor, RouterOutput]:
        """Routes the tokens of a pass."""
        context = self.state.current
        if context is not None:
            context = context.at_layer(self.layer)
        record = self.router(hidden.reshape(-1, hidden.shape[-1]), context)
        self.state.keep(self.name, record)
        return record.router_logits, record.combine_weights, record


def replace_routers(
    blocks: dict[str, RoutedBlock], make: Callable[..., Any], state: RoutingState
) -> dict[str, Any]:
    """Puts ``make(d_model=, num_experts=)`` in the place of each block's router and returns them.

    What the old router has learned is kept where the new one has room for it: the weight of its
    gate, and the bias on its choice in an `ExpertBias`. Warns of what is not kept, and of another
    number of experts a token than the model was trained with.
    """
    made, warned = {}, set()
    for name, block in blocks.items():
        old = block.router
        num_experts, d_model = old.weight.shape
        new = make(d_model=d_model, num_experts=num_experts).to(old.weight.device)
        if new.num_experts != num_experts:
            raise ValueError(
                f"{name}: the router routes to {new.num_experts} experts, the layer has "
                f"{num_experts}"
            )
        warned |= set(_hand_over(old, new))
        setattr(block.module, block.attribute, RouterInBlock(new, state, name, block.layer))
        made[name] = new
    for text in sorted(warned):
        warnings.warn(text, stacklevel=2)
    return made


@torch.no_grad()
def _hand_over(old: Any, new: Any) -> list[str]:
    """Copies what fits into the new router; what does not, and what else is different, in words."""
    kinds = type(old).__name__, type(new).__name__
    room: dict[str, Any] = {"weight": getattr(getattr(new, "gate", None), "weight", None)}
    balancer = getattr(new, "balancer", None)
    if isinstance(balancer, ExpertBias):
        room["e_score_correction_bias"] = balancer.bias
    told = []
    for name, tensor in [*old.named_parameters(), *old.named_buffers()]:
        place = room.get(name)
        if place is None or place.shape != tensor.shape:
            told.append(f"{kinds[0]}.{name} has no place in {kinds[1]} and is dropped")
        else:
            place.copy_(tensor)
    picked, picks = getattr(old, "top_k", None), getattr(new, "top_k", None)
    if None not in (picked, picks) and picks != picked:
        told.append(f"{kinds[0]} picked top_k={picked} experts, {kinds[1]} picks {picks:g}")
    return told
