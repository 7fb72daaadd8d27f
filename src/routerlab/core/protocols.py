"""What the rooms expect of each other. Classes satisfy these by shape; there is no base class."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals


@runtime_checkable
class Router(Protocol):
    """Tokens to a `RouterOutput`.

    Logits in float32 even under autocast, finite for finite input; a forward pass changes no state;
    permuting independent tokens permutes the result. A router that looks at other tokens of the
    batch (and so at the future) says ``causal = False``.
    """

    num_experts: int
    causal: bool

    def __call__(self, x: Float[Tensor, "T D"], context: RoutingContext | None) -> RouterOutput: ...


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
    """

    weight: float
    needs_step_counts: bool  # True: ``totals.requests_per_expert`` must be known before backward

    def __call__(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]: ...


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
