"""Schedules at work: attributes of losses, routers and balancers that follow training progress."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from routerlab.core.protocols import AuxLoss, LayerLoss, Schedule


class Scheduled:
    """Sets what each schedule's ``target`` names; a wrong target is refused at once."""

    def __init__(
        self,
        schedules: Mapping[str, Schedule],
        losses: Mapping[str, AuxLoss | LayerLoss],
        routers: Sequence[Any],
    ) -> None:
        self._items = [
            (schedule, owner, schedule.target.rsplit(".", 1)[-1])
            for schedule in schedules.values()
            for owner in _owners(schedule.target, losses, routers)
        ]

    def apply(self, progress: float) -> None:
        """Sets all values for a share ``progress`` of training. Whole numbers stay whole."""
        for schedule, owner, name in self._items:
            value = schedule.at(progress)
            whole = isinstance(getattr(owner, name), int)
            setattr(owner, name, math.floor(value + 0.5) if whole else value)


def _owners(
    target: str, losses: Mapping[str, AuxLoss | LayerLoss], routers: Sequence[Any]
) -> list[Any]:
    room, *path = target.split(".")
    owners: list[Any] = []
    if room == "loss" and len(path) == 2 and path[0] in losses:
        owners = [losses[path[0]]]
    elif room == "router" and len(path) == 1:
        owners = list(routers)
    elif room == "balancer" and len(path) == 1:
        owners = [b for r in routers if (b := getattr(r, "balancer", None)) is not None]
    values = [getattr(owner, path[-1], None) for owner in owners]
    if not owners or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    ):
        raise ValueError(
            f"schedule target={target!r}: must name a number that this run has: "
            f"loss.<one of {', '.join(losses) or 'none'}>.weight, router.<knob> or "
            "balancer.<knob> (a knob that is null is not a number)"
        )
    return owners
