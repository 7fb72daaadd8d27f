"""Which device computes which tokens under expert parallelism: the native plan and the least-loaded
one (LLEP; Nguyen et al., arXiv 2601.17111, algorithms 2 to 4).

Experts are sharded evenly: of N experts on P devices, device p owns N/P in a row, from p N/P on. A
load is a number of assignments, (token, slot) pairs, summed over all ranks of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal, NamedTuple

from routerlab.core.checks import choice, within
from routerlab.core.config import ConfigError

TRIGGERS = ("device", "expert")


class Range(NamedTuple):
    """Tokens ``start`` to ``end`` (exclusive) of one expert, computed on ``device``.

    Positions count the expert's tokens of the whole group: those of rank 0 first, then those of
    rank 1, and so on.
    """

    device: int
    start: int
    end: int


class Transfer(NamedTuple):
    """The weights of ``expert`` go from ``source``, which owns them, to ``target``."""

    expert: int
    source: int
    target: int


@dataclass(frozen=True)
class Plan:
    """Who computes what in one layer of one batch.

    ``assignments[i]`` are the ranges of expert i; they partition its load in increasing order, and
    a device may have several. ``device_load[p]`` is what device p computes. ``transfers`` names
    every (expert, device) pair once in which the device does not own the expert. ``ratio`` is the
    largest load over the mean before planning, of what the trigger looks at. ``capacity`` is the
    load above which a device spills, a threshold and not a bound; None where nothing is spilled.
    ``path`` is the kind of plan: native, least-loaded, or with experts copied in advance.
    """

    path: Literal["ep", "llep", "replicated"]
    assignments: tuple[tuple[Range, ...], ...]
    device_load: tuple[int, ...]
    transfers: tuple[Transfer, ...]
    ratio: float
    capacity: int | None

    @property
    def imbalance(self) -> float:
        """The largest device load over their mean, as planned; 1 without any load."""
        return _max_over_mean(self.device_load)


def plan_ep(loads: Sequence[int], num_devices: int) -> Plan:
    """Plain expert parallelism: every expert is computed where it lives.

    Raises:
        ConfigError: ``num_devices`` does not divide the number of experts, or a load is negative.
    """
    per_device = _experts_per_device(loads, num_devices)
    native = _native_loads(loads, per_device)
    return _native_plan(loads, per_device, native, _max_over_mean(native))


def plan_llep(
    loads: Sequence[int],
    num_devices: int,
    alpha: int | float = 1.0,
    min_tokens: int = 1024,
    threshold: int | float | None = 1.3,
    trigger: str = "device",
    keep_small_native: bool = False,
) -> Plan:
    """The least-loaded plan: devices above capacity hand tokens to those with the least to do.

    With T the sum of ``loads``, the capacity is max(1, int(alpha (T // P))), or T where T < P.
    Experts are placed by falling load (ties: lower number). Each keeps on its owner what fits
    beside the owner's other experts; the rest goes chunk by chunk to the least-loaded other device
    (ties: lower rank), as much as fits there. Where that is nothing, or fewer than ``min_tokens``
    without ending the rest, the whole rest is forced on that device. Deterministic: ranks which
    hold the same loads find the same plan.

    Args:
        loads: of each expert [N].
        num_devices: P, a divisor of N.
        alpha: capacity as a multiple of the mean device load; above 0. From 1 on no device gets
            more than max(capacity, largest native load); below, a rest is always forced.
        min_tokens: m, the fewest tokens worth a product of their own; the last chunk of an expert
            may be smaller.
        threshold: lambda; plans only where the largest load over the mean is at least this, and
            is the native plan otherwise. None plans always.
        trigger: whose loads the threshold looks at: those of a ``device``, as the reference code
            does, or of an ``expert``, as the paper's algorithm 4 is written.
        keep_small_native: an excess below ``min_tokens`` stays where it is, as the paper's prose
            says and its algorithm and code do not.

    Raises:
        ValueError: P does not divide N, or a value is out of its range.
    """
    per_device = _experts_per_device(loads, num_devices)
    _check_options(alpha, min_tokens, threshold, trigger)
    native = _native_loads(loads, per_device)
    ratio = _max_over_mean(native if trigger == "device" else loads)
    if threshold is not None and ratio < threshold:
        return _native_plan(loads, per_device, native, ratio)
    total = sum(loads)
    mean = total // num_devices
    capacity = max(1, int(alpha * mean)) if mean else total
    least = _LeastLoaded(native)
    assignments: list[tuple[Range, ...]] = [()] * len(loads)
    for expert in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        load, owner = loads[expert], expert // per_device
        if not load:
            break
        room = capacity - (least.load[owner] - load)
        kept = min(load, max(0, room))
        if num_devices == 1 or (keep_small_native and load - kept < min_tokens):
            kept = load
        least.set(owner, least.load[owner] - load + kept)
        ranges = [Range(owner, 0, kept)] if kept else []
        assignments[expert] = tuple(ranges + least.spill(kept, load, owner, capacity, min_tokens))
    return Plan(
        "llep", tuple(assignments), tuple(least.load), _transfers(assignments, per_device), ratio,
        capacity,
    )  # fmt: skip


def send_matrix(counts: Sequence[Sequence[int]], plan: Plan) -> list[list[int]]:
    """``S[s][d]``, the assignments that rank s sends to device d: the splits of the all-to-all.

    Args:
        counts: [P, N], the load of each expert on each rank; the columns add up to the loads that
            were planned.
        plan: of the group.

    Raises:
        ConfigError: the counts are not those that were planned.
    """
    devices = len(plan.device_load)
    if len(counts) != devices:
        raise ConfigError(f"counts of {len(counts)} ranks: the plan is for {devices}")
    sends = [[0] * devices for _ in range(devices)]
    for expert, ranges in enumerate(plan.assignments):
        rest = iter(ranges)
        device, left = -1, 0
        for row, of_rank in zip(sends, counts, strict=True):
            count = of_rank[expert]
            while count:
                if not left:
                    device, start, end = next(rest, Range(-1, 0, 0))
                    left = end - start
                    if not left:
                        raise ConfigError(f"expert {expert}: more counts than were planned")
                taken = min(count, left)
                row[device] += taken
                count, left = count - taken, left - taken
        if left or next(rest, None) is not None:
            raise ConfigError(f"expert {expert}: fewer counts than were planned")
    return sends


class _LeastLoaded:
    """Effective loads, assigned and pending, and the least of them; heap entries may be stale."""

    def __init__(self, load: Sequence[int]) -> None:
        self.load = list(load)
        self._heap = [(value, device) for device, value in enumerate(load)]
        heapify(self._heap)

    def set(self, device: int, load: int) -> None:
        self.load[device] = load
        heappush(self._heap, (load, device))

    def spill(self, start: int, end: int, owner: int, capacity: int, smallest: int) -> list[Range]:
        """Ranges of other devices than ``owner`` that together take ``start`` to ``end``.

        Only the least-loaded device needs a look: where its room is too small, so is any other's.
        """
        ranges: list[Range] = []
        while start < end:
            device = self._least_except(owner)
            rest = end - start
            taken = min(rest, capacity - self.load[device])
            if taken <= 0 or (taken < smallest and taken < rest):
                taken = rest
            if ranges and ranges[-1].device == device:
                ranges[-1] = ranges[-1]._replace(end=start + taken)
            else:
                ranges.append(Range(device, start, start + taken))
            self.set(device, self.load[device] + taken)
            start += taken
        return ranges

    def _least_except(self, owner: int) -> int:
        held = None
        while True:
            load, device = self._heap[0]
            if load == self.load[device] and device != owner:
                break
            heappop(self._heap)
            if load == self.load[device]:
                held = (load, device)
        if held is not None:
            heappush(self._heap, held)
        return device


def _experts_per_device(loads: Sequence[int], num_devices: int) -> int:
    if num_devices < 1 or not loads or len(loads) % num_devices:
        raise ConfigError(
            f"num_devices={num_devices}: must divide the {len(loads)} experts, so that each device "
            f"owns as many"
        )
    if min(loads) < 0:
        raise ConfigError(f"loads: {min(loads)} is negative")
    return len(loads) // num_devices


def _check_options(
    alpha: int | float, min_tokens: int, threshold: int | float | None, trigger: str
) -> None:
    within("alpha", alpha, 0, above=True)
    within("min_tokens", min_tokens, 0)
    if threshold is not None:
        within("threshold", threshold, 0)
    choice("trigger", trigger, TRIGGERS)


def _native_loads(loads: Sequence[int], per_device: int) -> list[int]:
    return [sum(loads[i : i + per_device]) for i in range(0, len(loads), per_device)]


def _native_plan(
    loads: Sequence[int], per_device: int, native: Sequence[int], ratio: float
) -> Plan:
    ranges = tuple(
        (Range(i // per_device, 0, load),) if load else () for i, load in enumerate(loads)
    )
    return Plan("ep", ranges, tuple(native), (), ratio, None)


def _transfers(assignments: Sequence[Sequence[Range]], per_device: int) -> tuple[Transfer, ...]:
    return tuple(
        Transfer(expert, expert // per_device, target)
        for expert, ranges in enumerate(assignments)
        for target in sorted({r.device for r in ranges})
        if target != expert // per_device
    )


def _max_over_mean(loads: Sequence[int]) -> float:
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0
