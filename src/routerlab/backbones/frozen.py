"""Models of which only a part learns: what is frozen, and what their state holds."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from routerlab.core.checks import choice
from routerlab.core.layers import pick_layers

PARTS = ("all", "moe", "experts", "routers", "none")


def train_part(backbone: Any, trainable: str, layers: int | Sequence[int] | None = None) -> None:
    """Freezes all parameters but those of ``trainable``: ``all``, the ``routers``, the ``experts``
    or both (``moe``) of the routed layers that ``layers`` names (`pick_layers`), or ``none``.

    Unless all learn, ``state_dict`` from now on holds only what learns and all routers: frozen ones
    may be fresh, and their balancers still move. The rest is read again from where the model came
    from, and ``load_state_dict`` leaves it alone.
    """
    choice("trainable", trainable, PARTS)
    if trainable == "all":
        if layers is not None:
            raise ValueError(
                f"trainable_layers={layers}: goes with trainable=routers, experts, moe"
            )
        return
    backbone.requires_grad_(False)
    for name in pick_layers(backbone.layer_names, layers, "trainable_layers"):
        layer = backbone.moe_layers[name]
        if trainable in ("moe", "routers"):
            layer.router.requires_grad_(True)
        if trainable in ("moe", "experts"):
            layer.experts.requires_grad_(True)
    routers = [layer.router.state_dict(keep_vars=True) for layer in backbone.moe_layers.values()]
    own = {id(tensor) for router in routers for tensor in router.values()}
    tensors = backbone.state_dict(keep_vars=True)
    keep_in_state(backbone, {k for k, t in tensors.items() if t.requires_grad or id(t) in own})


def keep_in_state(module: Any, keys: set[str]) -> None:
    """From now on ``module.state_dict()`` has these keys alone, and ``load_state_dict`` wants
    exactly them.
    """
    module._kept = frozenset(keys)
    module.register_state_dict_post_hook(_drop_frozen)
    module.register_load_state_dict_pre_hook(_fill_in_frozen)


def _drop_frozen(module: Any, state: Any, prefix: str, metadata: Any) -> None:
    for key in list(state):
        if key.startswith(prefix) and key.removeprefix(prefix) not in module._kept:
            del state[key]


def _fill_in_frozen(
    module: nn.Module,
    state: Any,
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Tells torch that the frozen weights load as they are, and reports any that came along."""
    for name, child in module.named_children():
        for key, own in child.state_dict(prefix=f"{prefix}{name}.", keep_vars=True).items():
            if key.removeprefix(prefix) not in module._kept:  # type: ignore[operator]
                if key in state:
                    unexpected.append(key)
                state[key] = own
