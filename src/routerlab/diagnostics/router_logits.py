"""How large the router's logits are."""

from collections.abc import Mapping

from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext


class RouterLogits:
    """``logit_norm``: mean over tokens of the Euclidean norm of the E router logits."""

    def sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> dict[str, Tensor]:
        """Summed norms and the number of tokens."""
        norms = output.without_padding(output.router_logits).norm(dim=-1)
        return {"norm": norms.sum(), "tokens": norms.new_full((), len(norms))}

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The number named above."""
        return {"logit_norm": sums["norm"] / sums["tokens"].clamp(min=1)}
