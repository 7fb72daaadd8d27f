"""Time, traffic and memory of one MoE layer under a plan: the cost model of LLEP (arXiv 2601.17111,
section 3), with its parts computed from the shape of the layer and the rates of a machine. The
paper gives the form of the time and memory of a device; the rates, the exchanges and the transfer
of weights beside them are [reconstructed].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from routerlab.analysis.expert_parallel.machines import LayerShape, Machine
from routerlab.ops.least_loaded import Plan

BYTES = 2  # of a bfloat16


@dataclass(frozen=True)
class LayerCost:
    """What a plan costs in one layer, on the worst device; ``transfers`` are those of all."""

    path: str
    max_load: int  # assignments
    imbalance: float  # max_load over the mean
    transfers: int  # expert weights that are moved for this batch, in the group
    transfer_bytes: int  # sent or received, the larger, with their gradients in training
    compute_seconds: int | float  # the experts
    exchange_seconds: int | float  # tokens and weights between devices
    seconds: int | float  # the layer, with its overheads
    memory_bytes: int  # weights that live there or are moved there, and what tokens take


def local_seconds(
    batches: Sequence[int], overhead: int | float, token_seconds: Callable[[int], int | float]
) -> int | float:
    """T_local: for each expert with B > 0 tokens on the device ``overhead`` + B t(B)."""
    return sum(overhead + count * token_seconds(count) for count in batches if count)


def local_elements(batches: Sequence[int], token_elements: int, weight_elements: int) -> int:
    """M_local: the weights of each expert on the device, of 0 tokens too, and its tokens."""
    return sum(count * token_elements + weight_elements for count in batches)


def device_batches(plan: Plan) -> list[list[int]]:
    """For each device the tokens of every expert there; 0 for one that only lives there. An expert
    of a replicated plan lives where it has tokens.
    """
    devices, experts = len(plan.device_load), len(plan.assignments)
    found: list[dict[int, int]] = [{} for _ in range(devices)]
    if plan.path != "replicated":
        per_device = experts // devices
        found = [dict.fromkeys(range(p * per_device, (p + 1) * per_device), 0)
                 for p in range(devices)]  # fmt: skip
    for expert, ranges in enumerate(plan.assignments):
        for r in ranges:
            found[r.device][expert] = found[r.device].get(expert, 0) + r.end - r.start
    return [list(batches.values()) for batches in found]


def token_seconds(shape: LayerShape, machine: Machine) -> Callable[[int], float]:
    """t(B), seconds a token of a batch of B through one expert, forward: its products, which take
    no less than to read the weights, and the passes over tokens (sorting, activation, unsorting).
    """
    products = 2 * shape.weight_elements / machine.flops_rate
    weights = shape.weight_elements * BYTES / machine.memory_rate
    passes = (4 * shape.d_model + 3 * shape.d_ff) * BYTES / machine.memory_rate
    return lambda count: max(products, weights / count) + passes


def layer_cost(
    plan: Plan, shape: LayerShape, machine: Machine, training: bool = False, extra: int = 0
) -> LayerCost:
    """The cost of one layer of one batch, tokens spread evenly over the group's ranks.

    Args:
        plan: of the group; its devices follow each other, whole nodes first.
        training: with the backward pass: three times the products, each exchange once more, and
            the gradients of moved weights on their way back. Copies of a replicated expert then
            add up their gradients.
        extra: room for copies on each device, of a replicated plan.
    """
    per_token, batches = token_seconds(shape, machine), device_batches(plan)
    once = [local_seconds(b, machine.expert_overhead, per_token) for b in batches]
    elements = [local_elements(b, shape.token_elements, shape.weight_elements) for b in batches]
    times, weight = (3, 2) if training else (1, 1), shape.weight_elements * BYTES
    if plan.path == "replicated":  # room that no tokens came to is taken as well
        held = len(plan.assignments) // len(batches) + extra
        elements = [
            held * shape.weight_elements + load * shape.token_elements for load in plan.device_load
        ]
    traffic = _Traffic.of(plan, shape.d_model * BYTES, machine.devices_per_node)
    moved = _Traffic.of_weights(plan, weight, machine.devices_per_node)
    exchange = traffic.seconds(machine) + (traffic + moved).seconds(machine)
    exchange = times[1] * (exchange + 2 * machine.exchange_latency) if len(batches) > 1 else 0.0
    if training and plan.path == "replicated":
        exchange += _gradients_of_copies(plan, weight, machine)
    mean = sum(plan.device_load) / len(plan.device_load)
    sorting = times[1] * 4 * shape.d_model * BYTES * mean / machine.memory_rate
    overhead = machine.layer_overhead + (machine.planning if plan.path == "llep" else 0.0)
    compute = times[0] * max(once)
    return LayerCost(
        path=plan.path,
        max_load=max(plan.device_load),
        imbalance=plan.imbalance,
        transfers=len(plan.transfers),
        transfer_bytes=times[1] * round(moved.largest()),
        compute_seconds=compute,
        exchange_seconds=exchange,
        seconds=overhead + sorting + exchange + compute,
        memory_bytes=max(elements) * BYTES,
    )


@dataclass(frozen=True)
class _Traffic:
    """Bytes that each device sends and receives, inside its node and to others."""

    near_sent: list[float]
    near_received: list[float]
    far_sent: list[float]
    far_received: list[float]

    @classmethod
    def of(cls, plan: Plan, size: int, node: int) -> "_Traffic":
        """Of assignments of ``size`` bytes on their way to the experts; the way back is alike."""
        devices = len(plan.device_load)
        own, sent, received = ([0.0] * devices for _ in range(3))
        for ranges in plan.assignments:
            share = (ranges[-1].end if ranges else 0) / devices  # of each rank
            for device, start, end in ranges:
                first = device // node * node
                for rank in range(first, min(first + node, devices)):
                    here = min(end, (rank + 1) * share) - max(start, rank * share)
                    if here <= 0:
                        continue
                    if rank == device:
                        own[rank] += here
                    else:
                        sent[rank] += here
                        received[device] += here
        mean = sum(plan.device_load) / devices
        far_sent = [mean - a - b for a, b in zip(own, sent, strict=True)]
        loads = zip(plan.device_load, own, received, strict=True)
        far_received = [load - a - b for load, a, b in loads]
        bytes_of = [[size * n for n in ns] for ns in (sent, received, far_sent, far_received)]
        return cls(*bytes_of)

    @classmethod
    def of_weights(cls, plan: Plan, size: int, node: int) -> "_Traffic":
        """Of expert weights of ``size`` bytes that are moved to helpers."""
        found = cls(*([0.0] * len(plan.device_load) for _ in range(4)))
        for _, source, target in plan.transfers:
            near = source // node == target // node
            (found.near_sent if near else found.far_sent)[source] += size
            (found.near_received if near else found.far_received)[target] += size
        return found

    def __add__(self, other: "_Traffic") -> "_Traffic":
        pairs = zip(self._parts(), other._parts(), strict=True)
        return _Traffic(*([x + y for x, y in zip(a, b, strict=True)] for a, b in pairs))

    def seconds(self, machine: Machine) -> int | float:
        """Until the busiest device is done; links and network work side by side."""
        near = max(*self.near_sent, *self.near_received) / machine.link_rate
        far = max(*self.far_sent, *self.far_received) / machine.network_rate
        return max(near, far)

    def largest(self) -> int | float:
        """The most that one device sends, or receives."""
        sent = zip(self.near_sent, self.far_sent, strict=True)
        received = zip(self.near_received, self.far_received, strict=True)
        return max(*(a + b for a, b in sent), *(a + b for a, b in received))

    def _parts(self) -> tuple[list[float], ...]:
        return self.near_sent, self.near_received, self.far_sent, self.far_received


def _gradients_of_copies(plan: Plan, size: int, machine: Machine) -> int | float:
    """Seconds of a ring all-reduce over the copies of every expert, on the busiest device."""
    busy = [0.0] * len(plan.device_load)
    for ranges in plan.assignments:
        homes = {r.device for r in ranges}
        nodes = {device // machine.devices_per_node for device in homes}
        rate = machine.link_rate if len(nodes) == 1 else machine.network_rate
        for device in homes:
            busy[device] += 2 * (len(homes) - 1) / len(homes) * size / rate
    return max(busy)
