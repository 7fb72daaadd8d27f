"""routerlab: a laboratory for mixture-of-experts routers.

    import routerlab as rl
    cfg = rl.compose("experiment=quickstart")  # the same configs as the command line
    model = rl.build_backbone(cfg)
    router = rl.build_router("token_choice", d_model=64, num_experts=8, top_k=2)
    layer = rl.MoE(d_model=64, d_ff=128, num_experts=8, router=router)

Names are imported when they are first used, so that ``import routerlab`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from routerlab.analysis import trace as trace
    from routerlab.comparison.frame import compare as compare
    from routerlab.comparison.routing import routing_agreement as routing_agreement
    from routerlab.comparison.routing import routing_history as routing_history
    from routerlab.core.config import available as available
    from routerlab.core.config import compose as compose
    from routerlab.core.routing import RouterOutput as RouterOutput
    from routerlab.core.routing import RoutingContext as RoutingContext
    from routerlab.moe.layer import MoE as MoE
    from routerlab.routers.build import build_router as build_router
    from routerlab.training.build import build_backbone as build_backbone

_PUBLIC = {
    "MoE": "routerlab.moe.layer",
    "RouterOutput": "routerlab.core.routing",
    "RoutingContext": "routerlab.core.routing",
    "available": "routerlab.core.config",
    "build_backbone": "routerlab.training.build",
    "build_router": "routerlab.routers.build",
    "compare": "routerlab.comparison.frame",
    "compose": "routerlab.core.config",
    "routing_agreement": "routerlab.comparison.routing",
    "routing_history": "routerlab.comparison.routing",
    "trace": "routerlab.analysis",
}
__all__ = list(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'routerlab' has no attribute {name!r}")
    if name == "trace":
        return importlib.import_module("routerlab.analysis.trace")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
