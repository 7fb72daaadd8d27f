"""Schedules at work: attributes of losses, routers and balancers that follow training progress."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from routerlab.core.protocols import AuxLoss, LayerLoss, RecordsLoss, Schedule


class Scheduled:
    """Sets what each schedule's ``target`` names; a wrong target is refused at once."""

    def __init__(
        self,
        schedules: Mapping[str, Schedule],
        losses: Mapping[str, AuxLoss | LayerLoss | RecordsLoss],
        routers: Sequence[Any],
    ) -> None:
        self._items = [
            (schedule, owner, schedule.target.rsplit(".", 1)[-1])
            for schedule in schedules.values()
            for owner in _owners(schedule.target, losses, routers)
        ]

    def __bool__(self) -> bool:
        return bool(self._items)

    def apply(self, progress: int | float) -> None:
        """Sets all values for a share ``progress`` of training."""
        for schedule, owner, name in self._items:
            setattr(owner, name, fitting(schedule.at(progress), type(owner), name))


def fitting(value: int | float, owner: type, knob: str) -> int | float:
    """The value as the knob of a class takes it: whole numbers where its constructor says so."""
    annotation = inspect.signature(owner).parameters[knob].annotation
    return math.floor(value + 0.5) if annotation in (int, "int") else float(value)


def _owners(
    target: str, losses: Mapping[str, AuxLoss | LayerLoss | RecordsLoss], routers: Sequence[Any]
) -> list[Any]:
    room, *path = target.split(".")
    owners: list[Any] = []
    if room == "loss" and len(path) == 2 and path[0] in losses:
        owners = [losses[path[0]]]
    elif room == "router" and len(path) == 1:
        owners = list(routers)
    elif room == "balancer" and len(path) == 1:
        owners = [b for r in routers if (b := getattr(r, "balancer", None)) is not None]
    if not owners or not all(_is_number(owner, path[-1]) for owner in owners):
        raise ValueError(
            f"schedule target={target!r}: must name a number that this run has: "
            f"loss.<one of {', '.join(losses) or 'none'}>.weight, router.<knob> or "
            "balancer.<knob> (a knob that is null is not a number)"
        )
    return owners


def _is_number(owner: Any, knob: str) -> bool:
    knobs = inspect.signature(type(owner)).parameters
    fixed = ("d_model", "num_experts")  # shapes
    return knob in knobs and knob not in fixed and type(getattr(owner, knob, None)) in (int, float)
