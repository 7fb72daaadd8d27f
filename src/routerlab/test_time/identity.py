"""The plug-in that changes nothing, to test the way there and to time it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from routerlab.core.routing import RoutingContext
from routerlab.test_time.plug_in import Cost, Edit


class Identity:
    """Router logits pass through an edit that gives them back: no bit of the output changes."""

    every: int | None = None
    uses_answer = False

    def __init__(self) -> None:
        self.cost = Cost()

    def adapt(
        self,
        backbone: Any,
        batch: Mapping[str, Tensor],
        context: RoutingContext,
        previous: Edit | None = None,
    ) -> Edit:
        """The edit that returns its logits."""
        return lambda name, logits: logits
