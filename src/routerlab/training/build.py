"""Models of composed configs."""

from typing import Any

from omegaconf import DictConfig
from torch import nn

from routerlab.core.instantiate import build, build_all, partial
from routerlab.routers.build import with_balancer
from routerlab.schedules.layerwise import LayerwiseExperts


def build_backbone(cfg: DictConfig) -> nn.Module:
    """The model of a composed config, freshly initialised."""
    knobs: dict[str, Any] = {}
    for schedule in build_all(cfg.get("schedule")).values():
        if isinstance(schedule, LayerwiseExperts):
            knobs["num_experts"] = schedule(cfg.backbone.num_layers)
    return build(cfg.backbone, router=with_balancer(cfg), experts=partial(cfg.experts), **knobs)
