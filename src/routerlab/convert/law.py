"""How a checkpoint's routers pick and weigh."""

from dataclasses import asdict, dataclass
from typing import Any

from routerlab.backbones.decoder import Decoder
from routerlab.balancers.expert_bias import ExpertBias
from routerlab.routers.token_choice import TokenChoice

# What draws or drops in training alone: the exported function, that of evaluation, is the same.
_IN_TRAINING = ("jitter_eps", "second_choice_threshold", "capacity_factor")


@dataclass(frozen=True)
class Law:
    """The arguments of `TokenChoice` that decide in evaluation; ``biased``: a bias on the choice,
    for which our router has an `ExpertBias`.
    """

    top_k: int
    score_fn: str = "softmax"
    normalize_weights: bool = True
    route_scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    biased: bool = False

    def nodes(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The config nodes of a router with this law, and of its balancer."""
        knobs = asdict(self)
        del knobs["biased"]
        router = {"_target_": f"{TokenChoice.__module__}.{TokenChoice.__name__}"} | knobs
        balancer = {"_target_": f"{ExpertBias.__module__}.{ExpertBias.__name__}"}
        return router, balancer if self.biased else None


def law_of(decoder: Decoder) -> tuple[Law, list[str]]:
    """The one law of a decoder's routers, and what they do in training besides.

    Raises ValueError, naming the feature, for routers that no class of transformers has.
    """
    routers = {name: layer.router for name, layer in decoder.moe_layers.items()}
    laws = {name: _law(router) for name, router in routers.items()}
    first = next(iter(laws))
    for name, law in laws.items():
        if law != laws[first]:
            raise ValueError(
                f"routers that differ between layers: {first} has {laws[first]}, {name} has {law}; "
                "no class of transformers has such"
            )
    counts = {layer.experts.num_experts for layer in decoder.moe_layers.values()}
    if len(counts) > 1:
        raise ValueError(
            f"numbers of experts that differ between layers ({sorted(counts)}): no class of "
            "transformers has such"
        )
    router = routers[first]
    found = {name: getattr(router, name) for name in _IN_TRAINING}
    return laws[first], [f"{name}={value}" for name, value in found.items() if value]


def _law(router: Any) -> Law:
    kind = type(router).__name__
    if type(router) is not TokenChoice:
        raise ValueError(
            f"router {kind}: no class of transformers routes like that; only TokenChoice (router="
            "token_choice, mixtral, olmoe, deepseek_v3, ...) can be exported"
        )
    if router.eval_capacity_factor is not None:
        raise ValueError(
            f"eval_capacity_factor={router.eval_capacity_factor}: experts of transformers have no "
            "capacity; export needs eval_capacity_factor=null"
        )
    if router.noise_gate is not None:
        raise ValueError("noise=true: routers of transformers have no noise gate to export it to")
    if router.balancer is not None and type(router.balancer) is not ExpertBias:
        name = type(router.balancer).__name__
        raise ValueError(f"balancer {name}: only ExpertBias has a place in transformers")
    return Law(
        router.top_k,
        router.score_fn,
        router.normalize_weights,
        router.route_scale,
        router.num_groups,
        router.groups_per_token,
        router.balancer is not None,
    )
