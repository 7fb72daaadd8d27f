"""What the rooms expect of each other. Classes satisfy these by shape; there is no base class."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals


@runtime_checkable
class Router(Protocol):
    """Tokens to a `RouterOutput`.

    Logits in float32 even under autocast, finite for finite input; a forward pass changes no state;
    permuting independent tokens permutes the result. A router that looks at other tokens of the
    batch (and so at the future) says ``causal = False``.

    What else a router may have, found by name:

    - ``causal_training``: False where only training looks at later tokens (``causal`` if absent);
    - ``order_dependent``: True where a token's place in the batch matters (a queue, or draws by
      place in evaluation; draws of training need not be declared);
    - ``ties``: True where experts come out equal by construction and the lower number is taken;
    - ``top_k``: experts a token has, where that is fixed (or, as a float, their mean);
    - ``update(requests_per_expert, proposal)``: called once after each optimizer step with the
      step's counts [E] and the mean of the records' ``proposal``; all state changes happen there.
    """

    num_experts: int

    @property
    def causal(self) -> bool:
        """False where evaluation looks at later tokens."""
        ...

    def __call__(self, x: Float[Tensor, "T D"], context: RoutingContext | None) -> RouterOutput: ...


@runtime_checkable
class Balancer(Protocol):
    """A bias on the scores by which experts are picked, learned from load and without gradient.

    The bias changes which experts are picked and never a combine weight.
    """

    @property
    def causal(self) -> bool:
        """False where evaluation looks at later tokens."""
        ...

    @property
    def causal_training(self) -> bool:
        """The same in training."""
        ...

    def __call__(
        self,
        scores: Float[Tensor, "T E"],
        top_k: int,
        context: RoutingContext | None = None,
    ) -> tuple[Tensor, Float[Tensor, "E"]]:
        """The bias to add to detached scores ([E], or [T, E] where tokens come one by one), and the
        bias that this micro-batch proposes to keep.
        """
        ...

    def update(self, requests_per_expert: Int[Tensor, "E"], proposal: Float[Tensor, "E"]) -> None:
        """Once after the optimizer step, with its counts and the mean of its proposals."""
        ...


@runtime_checkable
class Experts(Protocol):
    """E networks with stacked weights."""

    num_experts: int

    def __call__(
        self,
        x: Float[Tensor, "N D"],
        tokens_per_expert: Int[Tensor, "E"],
        combine_weights: Float[Tensor, "N"],
    ) -> Float[Tensor, "N D"]:
        """Weighted expert outputs of rows sorted by expert."""
        ...

    def expert(
        self, index: int, x: Float[Tensor, "n D"], combine_weights: Float[Tensor, "n"]
    ) -> Float[Tensor, "n D"]:
        """Weighted outputs of one expert: the readable definition of the above."""
        ...


@runtime_checkable
class Dispatch(Protocol):
    """Tokens to their experts and back."""

    def __call__(
        self, x: Float[Tensor, "T D"], output: RouterOutput, experts: Experts
    ) -> Float[Tensor, "T D"]: ...


@runtime_checkable
class AuxLoss(Protocol):
    """One layer's record to a scalar.

    The value is this micro-batch's *share*: the shares of all micro-batches and ranks of an
    optimizer step add up to the loss of the step. Without ``totals`` the record is the whole step.

    A loss that is not linear in sums over tokens says ``needs_step_sums = True`` and has
    ``step_sums(output, context) -> Float[P]``: the sums of one record, which come back in
    ``totals.sums`` added over the step (see `losses.share`). A loss over all layers together says
    ``pool_layers = True``: it is called once, on a record of the tokens of all layers
    (`objectives.pooling`).
    """

    weight: float
    needs_step_sums: bool

    def __call__(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]: ...


@runtime_checkable
class RecordsLoss(Protocol):
    """The records of all layers together to a scalar: this micro-batch's share, as in `AuxLoss`."""

    weight: float

    def of_records(
        self,
        records: Mapping[str, RouterOutput],
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """The share of a micro-batch; ``totals.num_sequences`` is the number of samples."""
        ...


@runtime_checkable
class LayerLoss(Protocol):
    """One layer's weights to a scalar, once an optimizer step: no token is looked at."""

    weight: float

    def of_layer(self, layer: Any, context: RoutingContext | None = None) -> Float[Tensor, ""]:
        """The loss of a layer with ``router`` and ``experts`` (a `MoE`). Noise comes from
        ``context.step_generator``, which is the same on all ranks.
        """
        ...


@runtime_checkable
class Schedule(Protocol):
    """A value that follows training progress, and what it sets: ``loss.<name>.<attribute>``,
    ``router.<attribute>`` or ``balancer.<attribute>`` (of every layer).
    """

    target: str

    def at(self, progress: int | float) -> int | float:
        """The value when a share ``progress`` (0 to 1) of training is done."""
        ...

    def extremes(self) -> list[int | float]:
        """The values between which it moves."""
        ...


@runtime_checkable
class Diagnostic(Protocol):
    """One layer's records to named numbers, in two halves with the reduction between them."""

    def sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> dict[str, Tensor]:
        """Additive over tokens: added over micro-batches and ranks before any ratio is taken."""
        ...

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers and distributions of the added sums; float64 in, any shape out."""
        ...
