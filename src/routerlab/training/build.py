"""Models of composed configs."""

import inspect
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from routerlab.core.config import ConfigError
from routerlab.core.instantiate import build, build_all, locate, parameters, partial
from routerlab.routers.build import with_balancer
from routerlab.schedules.layerwise import LayerwiseExperts


def build_backbone(cfg: DictConfig) -> nn.Module:
    """The model of a composed config: freshly initialised, read from where it lies, or pretrained
    and frozen with a fresh adapter (without one, if ``cfg.adapter`` is null: for evaluation alone).
    """
    name = cfg.backbone["_target_"].rsplit(".", 1)[-1]
    schedules = build_all(cfg.get("schedule")).values()
    by_layer = [schedule for schedule in schedules if isinstance(schedule, LayerwiseExperts)]
    if by_layer and "num_layers" not in cfg.backbone:
        raise ConfigError(
            f"schedule: {name} has no layers to build, so experts by layer do not go with it"
        )
    if takes_adapter(cfg):
        return build(cfg.backbone, adapter=build_adapter(cfg))
    target, given = locate(cfg.backbone["_target_"]), {}
    if cfg.get("router") is not None:
        given["router"] = with_balancer(cfg)
    elif inspect.signature(target).parameters["router"].default is not None:
        raise ConfigError(f"router: backbone {name} needs one; use router=token_choice")
    elif cfg.get("balancer"):
        raise ConfigError("balancer: goes with a router of ours; use balancer=none, or router=NAME")
    taken = parameters(target)
    if "experts" in taken:
        given["experts"] = partial(cfg.experts)
    if "dispatch" in taken and "dispatch" not in cfg.backbone:  # older runs have it there
        given["dispatch"] = build(cfg.dispatch)
    for schedule in by_layer:
        given["num_experts"] = schedule(cfg.backbone.num_layers)
    return build(cfg.backbone, **given)


def takes_adapter(cfg: DictConfig) -> bool:
    """Whether the backbone is a frozen model that learns by an adapter; ConfigError for an adapter
    of one that is not.
    """
    if "adapter" in parameters(locate(cfg.backbone["_target_"])):
        return True
    if cfg.get("adapter"):
        name = cfg.backbone["_target_"].rsplit(".", 1)[-1]
        raise ConfigError(
            f"adapter: backbone {name} is trained as a whole and takes none; use "
            "backbone=pretrained, or leave the adapter out (~adapter)"
        )
    return False


def build_adapter(cfg: DictConfig) -> Any:
    """The PEFT config of ``cfg.adapter``, None for null.

    An adapter that takes a router gets ``cfg.router`` as a plain dict, with ``cfg.balancer`` under
    ``balancer``, or None; one that takes none refuses a router. ``num_tasks: null`` becomes the
    number of tasks in the data.
    """
    if not cfg.get("adapter"):
        return None
    takes = parameters(locate(cfg.adapter["_target_"]))
    name = cfg.adapter["_target_"].rsplit(".", 1)[-1]
    given: dict[str, Any] = {}
    if "router" in takes:
        if cfg.get("router"):
            given["router"] = _router(cfg)
        elif "router" not in cfg.adapter:
            given["router"] = None
    elif cfg.get("router"):
        router = cfg.router["_target_"].rsplit(".", 1)[-1]
        raise ConfigError(f"router {router}: adapter {name} is plain LoRA and has no router")
    if "num_tasks" in cfg.adapter:
        given["num_tasks"] = _num_tasks(cfg)
    return build(cfg.adapter, **given)


def _router(cfg: DictConfig) -> dict[str, Any]:
    with_balancer(cfg)  # refuses what does not go together
    router: Any = OmegaConf.to_container(cfg.router, resolve=True)
    if cfg.get("balancer"):
        router["balancer"] = OmegaConf.to_container(cfg.balancer, resolve=True)
    return router


def _num_tasks(cfg: DictConfig) -> int:
    tasks, wanted = cfg.data.get("tasks"), cfg.adapter.num_tasks
    if tasks is None:
        raise ConfigError(
            "adapter.num_tasks: this adapter tells tasks apart, and the data have none; use task "
            "data such as data=sarcasm"
        )
    if wanted is not None and wanted < len(tasks):
        raise ConfigError(f"adapter.num_tasks={wanted}: data.tasks has {len(tasks)} tasks")
    return len(tasks) if wanted is None else wanted
