"""Expert replication: hot experts are kept on several devices, before the batch is known."""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from routerlab.core.checks import within
from routerlab.core.config import ConfigError
from routerlab.ops.least_loaded import Plan, Range, plan_ep


def plan_replicated(
    loads: Sequence[int], num_devices: int, extra: int, expected: Sequence[int] | None = None
) -> Plan:
    """Each device has room for ``extra`` experts beside its N/P, filled by the two greedy rules of
    DeepSeek's load balancer (https://github.com/deepseek-ai/EPLB, global policy):

    1. one more copy, P x ``extra`` times, of the expert with the most load a copy (ties: lower
       number);
    2. copies by falling load, each on the device with the least load that has room (ties: lower
       number). So an expert may live elsewhere than in plain expert parallelism, or twice on a
       device.

    The copies of an expert then share its tokens evenly. Weights are moved when the placement
    changes and not in the batch, so the plan has no transfers.

    Args:
        loads: of the batch [N].
        num_devices: P, a divisor of N.
        extra: experts of which each device has room for a copy; 0 repacks the experts.
        expected: loads that the placement was made for [N]; null: those of the batch, which no
            system knows in advance: the best case.

    Raises:
        ValueError: P does not divide N, ``extra`` is negative, or ``expected`` is of other experts.
    """
    native = plan_ep(loads, num_devices)
    within("extra", extra, 0)
    expected = loads if expected is None else expected
    if len(expected) != len(loads):
        raise ConfigError(f"expected loads of {len(expected)} experts: there are {len(loads)}")
    copies = _copies(expected, num_devices * extra)
    homes = _pack(expected, copies, num_devices)
    assignments = [
        tuple(
            Range(device, load * i // len(devices), load * (i + 1) // len(devices))
            for i, device in enumerate(devices)
            if load * (i + 1) // len(devices) > load * i // len(devices)
        )
        for load, devices in zip(loads, homes, strict=True)
    ]
    device_load = [0] * num_devices
    for ranges in assignments:
        for r in ranges:
            device_load[r.device] += r.end - r.start
    return Plan("replicated", tuple(assignments), tuple(device_load), (), native.ratio, None)


def _copies(expected: Sequence[int], extra: int) -> list[int]:
    """How many copies of each expert there are."""
    copies = [1] * len(expected)
    heap = [(-float(load), expert) for expert, load in enumerate(expected)]
    heapify(heap)
    for _ in range(extra):
        _, expert = heap[0]
        copies[expert] += 1
        heappop(heap)
        heappush(heap, (-expected[expert] / copies[expert], expert))
    return copies


def _pack(expected: Sequence[int], copies: Sequence[int], num_devices: int) -> list[list[int]]:
    """The devices of each expert's copies, in their order."""
    slots = sum(copies) // num_devices
    free = [slots] * num_devices
    heap = [(0.0, device) for device in range(num_devices)]
    homes: list[list[int]] = [[] for _ in expected]
    each = [(load / count, e) for e, (load, count) in enumerate(zip(expected, copies, strict=True))]
    for load, expert in sorted(each, key=lambda pair: (-pair[0], pair[1])):
        for _ in range(copies[expert]):
            before, device = heappop(heap)
            homes[expert].append(device)
            free[device] -= 1
            if free[device]:
                heappush(heap, (before + load, device))
    return [sorted(devices) for devices in homes]
