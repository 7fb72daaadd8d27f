"""The MoE layer: router, dispatch, experts, and experts that every token shares."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.core.protocols import Dispatch, Experts, Router
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.dispatch.autograd import Autograd
from routerlab.dispatch.fused import Fused
from routerlab.dispatch.loop import Loop
from routerlab.experts.swiglu import SwiGLU

DISPATCHES: dict[str, Callable[[], Dispatch]] = {
    "auto": Fused,
    "blocks": partial(Fused, engine="blocks"),
    "grouped": partial(Fused, engine="grouped"),
    "autograd": Autograd,
    "loop": Loop,
}


def find_dispatch(dispatch: str | Dispatch) -> Dispatch:
    """The dispatch itself, or the one of that name; ValueError for a name that nothing has."""
    if not isinstance(dispatch, str):
        return dispatch
    if dispatch not in DISPATCHES:
        raise ValueError(f"dispatch={dispatch!r}: must be one of {sorted(DISPATCHES)}")
    return DISPATCHES[dispatch]()


class MoE(nn.Module):
    """``(x, context) -> (y, RouterOutput)``: the routed sum plus the shared experts.

    Args:
        d_model: D.
        d_ff: F, hidden width of one expert.
        num_experts: E, routed experts.
        router: a `Router`, or a callable ``(d_model=, num_experts=) -> Router``.
        experts: a callable ``(d_model=, d_ff=, num_experts=) -> Experts``; default `SwiGLU`.
        num_shared_experts: experts that see every token with weight 1 and no gate (DeepSeekMoE,
            arXiv 2401.06066, equation 9), kept as one SwiGLU of their summed width.
        dispatch: a `Dispatch`, or the name of one in `DISPATCHES`.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        router: Router | Callable[..., Router],
        experts: Callable[..., Experts] = SwiGLU,
        num_shared_experts: int = 0,
        dispatch: str | Dispatch = "auto",
    ) -> None:
        super().__init__()
        if num_shared_experts < 0:
            raise ValueError(f"num_shared_experts={num_shared_experts}: must be 0 or more")
        if not isinstance(router, nn.Module):
            router = cast(Callable[..., Router], router)(d_model=d_model, num_experts=num_experts)
        router = cast(Router, router)
        if router.num_experts != num_experts:
            raise ValueError(
                f"the router routes to {router.num_experts} experts, the layer has {num_experts}"
            )
        self.dispatch = find_dispatch(dispatch)
        self.router: Any = router
        self.experts: Any = experts(d_model=d_model, d_ff=d_ff, num_experts=num_experts)
        self.shared_experts = (
            DenseSwiGLU(d_model, d_ff * num_shared_experts) if num_shared_experts else None
        )

    def forward(
        self, x: Float[Tensor, "*batch D"], context: RoutingContext | None = None
    ) -> tuple[Float[Tensor, "*batch D"], RouterOutput]:
        """The layer's output, of the shape of ``x``, and what its router decided."""
        tokens = x.reshape(-1, x.shape[-1])
        output = self.router(tokens, context)
        y = self.dispatch(tokens, output, self.experts)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        return y.view_as(x), output


class DenseSwiGLU(nn.Module):
    """The SwiGLU feed-forward network of a dense transformer (Shazeer, arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        nn.init.normal_(self.gate_up_proj.weight, std=d_model**-0.5)
        nn.init.normal_(self.down_proj.weight, std=d_ff**-0.5)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The network's output, of the shape of ``x``."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)
