"""What all test-time plug-ins share: they look at a batch, then edit router logits in a pass."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from routerlab.core.routing import RoutingContext

# (layer name, router logits [T, E]) -> logits [T, E], float32 or wider; tokens are batch-major
Edit = Callable[[str, Tensor], Tensor]


@dataclass
class Cost:
    """What a plug-in has spent on top of the passes that it edits. ``tokens`` counts those of its
    extra forward passes; a backward pass goes with each of ``backward_passes``.
    """

    forward_passes: int = 0
    backward_passes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the seconds spent inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def add(self, passes: int, tokens: int, backward: bool) -> None:
        """Adds forward passes over ``tokens`` tokens each, and backward passes through them."""
        self.forward_passes += passes
        self.backward_passes += passes if backward else 0
        self.tokens += passes * tokens


@runtime_checkable
class TestTime(Protocol):
    """Decides for each batch how its routing is to be changed. It changes no weight, and what it
    does to one sequence does not depend on the others of the batch or on earlier batches.

    ``every``: tokens that a generation adds before the next adaptation, None for a single one.
    ``uses_answer``: it looks at what the model is to say, so what comes out is a bound for analysis
    and no result.
    """

    cost: Cost
    every: int | None
    uses_answer: bool

    def adapt(
        self,
        backbone: Any,
        batch: Mapping[str, Tensor],
        context: RoutingContext,
        previous: Edit | None = None,
    ) -> Edit | None:
        """The edit for a pass over ``batch["input_ids"]`` [B, S]; None leaves the routing alone.

        Only the prompt (``context.prompt``) may be looked at, unless ``uses_answer``. ``previous``
        is the edit of the same sequences when they were shorter, in a generation.
        """
        ...


@contextmanager
def rerouting(
    plug_in: TestTime | None, backbone: Any, batch: Mapping[str, Tensor], context: RoutingContext
) -> Iterator[None]:
    """Inside, passes of ``backbone`` are routed as ``plug_in`` decides for this batch."""
    edit = None if plug_in is None else plug_in.adapt(backbone, batch, context)
    with edited(backbone, edit):
        yield


@contextmanager
def edited(backbone: Any, edit: Edit | None, layers: Sequence[str] | None = None) -> Iterator[None]:
    """Inside, router logits of ``layers`` (None: of all routed layers) go through ``edit`` before
    anything is made of them: selection and weights both follow, by the router's own law.

    Raises ValueError for a router without logits (``router.gate``), such as a hash.
    """
    with ExitStack() as hooks:
        for name, layer in backbone.moe_layers.items() if edit is not None else ():
            if layers is not None and name not in layers:
                continue
            gate = getattr(layer.router, "gate", None)
            if not isinstance(gate, nn.Module):
                raise ValueError(
                    f"{name}: {type(layer.router).__name__} has no router logits to edit"
                )
            hooks.enter_context(_edited_gate(gate, name, edit))
        yield


@contextmanager
def _edited_gate(gate: nn.Module, name: str, edit: Any) -> Iterator[None]:
    handle = gate.register_forward_hook(lambda module, args, logits: edit(name, logits))
    try:
        yield
    finally:
        handle.remove()
