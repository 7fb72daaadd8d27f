"""What routers with state ask of it each step: bias, prices, thresholds."""

from collections.abc import Mapping

from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext


class RouterState:
    """Mean, population standard deviation, least and greatest element of the records' ``proposal``
    (averaged over micro-batches and ranks): ``state_mean``, ``state_std``, ``state_min``,
    ``state_max``. Routers without state have none of them.
    """

    def sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> dict[str, Tensor]:
        """Summed proposals and their number."""
        if output.proposal is None:
            return {}
        return {"proposal": output.proposal, "records": output.proposal.new_ones(())}

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The numbers named above."""
        state = sums["proposal"] / sums["records"].clamp(min=1)
        return {
            "state_mean": state.mean(),
            "state_std": state.std(correction=0),
            "state_min": state.min(),
            "state_max": state.max(),
        }
