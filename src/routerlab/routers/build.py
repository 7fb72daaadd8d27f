"""Routers by the names of their configs."""

import functools
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig
from torch import nn

from routerlab.core.config import ConfigError, compose, nearest
from routerlab.core.instantiate import locate, parameters, partial


def build_router(name: str, **knobs: Any) -> nn.Module:
    """The router of ``configs/router/<name>.yaml`` with its knobs: ``d_model``, ``num_experts`` and
    any that the file holds. It has the balancer that the file chooses, unless ``balancer`` is
    given: None, a name in ``configs/balancer``, or a callable ``(num_experts=) -> Balancer``.
    """
    cfg = compose(f"router={name}")
    target = locate(cfg.router["_target_"])
    unknown = [knob for knob in knobs if knob not in parameters(target)]
    if unknown:
        hint = nearest(unknown[0], parameters(target))
        raise ConfigError(f"router {name!r} has no knob {unknown[0]!r}; {hint}")
    if isinstance(knobs.get("balancer"), str):
        knobs["balancer"] = partial(compose(f"balancer={knobs['balancer']}").balancer)
    return with_balancer(cfg)(**knobs)


def with_balancer(cfg: DictConfig) -> Callable[..., Any]:
    """The config's router, still to be called, with the config's balancer where it has one."""
    router = partial(cfg.router)
    if not cfg.get("balancer"):
        return router
    target = cfg.router["_target_"]
    if "balancer" not in parameters(locate(target)):
        name = cfg.balancer["_target_"].rsplit(".", 1)[-1]
        raise ConfigError(
            f"balancer {name}: {target.rsplit('.', 1)[-1]} balances in its own way, or not at all, "
            "and takes no bias; use balancer=none, or router=token_choice"
        )
    return functools.partial(router, balancer=partial(cfg.balancer))
