"""The same loads under plain expert parallelism, LLEP and expert replication."""

from collections.abc import Sequence
from dataclasses import dataclass

from routerlab.analysis.expert_parallel.layer import LayerCost, layer_cost
from routerlab.analysis.expert_parallel.machines import LayerShape, Machine
from routerlab.analysis.expert_parallel.replication import plan_replicated
from routerlab.core.config import ConfigError
from routerlab.ops.least_loaded import plan_ep, plan_llep

METHODS = ("ep", "llep", "replication")


@dataclass(frozen=True)
class Knobs:
    """Those of `plan_llep`, and the ``extra`` room for copies of `plan_replicated`."""

    alpha: int | float = 1.0
    min_tokens: int = 1024
    threshold: int | float | None = 1.3
    trigger: str = "device"
    keep_small_native: bool = False
    extra: int = 1


def simulate_layer(
    loads: Sequence[int],
    shape: LayerShape,
    group: int,
    machine: Machine,
    knobs: Knobs | None = None,
    *,
    training: bool = False,
    expected: Sequence[int] | None = None,
) -> dict[str, LayerCost]:
    """What one layer costs in one group of devices, by each of `METHODS`.

    Args:
        loads: of the group's batch [N].
        group: devices among which the experts are spread, a divisor of N.
        training: see `layer_cost`.
        expected: loads that replication was placed for; null: those of the batch.

    Raises:
        ValueError: the loads are not those of ``shape``, or a planner refuses its arguments.
    """
    if len(loads) != shape.num_experts:
        raise ConfigError(f"loads of {len(loads)} experts: the layer has {shape.num_experts}")
    knobs = Knobs() if knobs is None else knobs
    plans = {
        "ep": plan_ep(loads, group),
        "llep": plan_llep(
            loads, group, knobs.alpha, knobs.min_tokens, knobs.threshold, knobs.trigger,
            knobs.keep_small_native,
        ),
        "replication": plan_replicated(loads, group, knobs.extra, expected),
    }  # fmt: skip
    return {
        name: layer_cost(plan, shape, machine, training, knobs.extra)
        for name, plan in plans.items()
    }


def check_group(devices: int, group: int, num_experts: int) -> None:
    """Refuses groups that do not share out the devices and the experts evenly.

    Raises:
        ConfigError: ``group`` does not divide both.
    """
    for what, number in (("devices", devices), ("experts", num_experts)):
        if group < 1 or number % group:
            raise ConfigError(
                f"group={group}: an expert-parallel group must divide the {number} {what}; both "
                f"allow {', '.join(map(str, _common_divisors(devices, num_experts)))}"
            )


def _common_divisors(a: int, b: int) -> list[int]:
    return [n for n in range(1, min(a, b) + 1) if not a % n and not b % n]
