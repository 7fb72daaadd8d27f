"""The least-loaded plan: worked cases, the paper's algorithm as it is written, and its laws."""

from collections.abc import Sequence
from time import process_time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from routerlab.ops.least_loaded import Plan, plan_ep, plan_llep, send_matrix


def as_written(
    loads: Sequence[int], num_devices: int, alpha: float, min_tokens: int
) -> tuple[list[list[tuple[int, int, int]]], list[int]]:
    """Algorithms 2 and 3 line by line: helpers sorted anew after every chunk, each one tried."""
    per_device, total = len(loads) // num_devices, sum(loads)
    mean = total // num_devices
    capacity = max(1, int(alpha * mean)) if mean else total
    pending = [sum(loads[p * per_device : (p + 1) * per_device]) for p in range(num_devices)]
    assigned = [0] * num_devices
    found: list[list[tuple[int, int, int]]] = [[] for _ in loads]
    for expert in sorted(range(len(loads)), key=lambda i: -loads[i]):
        load, owner = loads[expert], expert // per_device
        pending[owner] -= load
        room = capacity - assigned[owner] - pending[owner]
        kept = load if num_devices == 1 else min(load, max(room, 0))
        if kept:
            found[expert].append((owner, 0, kept))
            assigned[owner] += kept
        offset, rest = kept, load - kept
        while rest:
            others = [p for p in range(num_devices) if p != owner]
            others.sort(key=lambda p: assigned[p] + pending[p])
            for device in others:
                chunk = min(rest, capacity - assigned[device] - pending[device])
                if chunk > 0 and not (chunk < min_tokens and rest > chunk):
                    break
            else:
                device, chunk = others[0], rest
            found[expert].append((device, offset, offset + chunk))
            assigned[device] += chunk
            offset, rest = offset + chunk, rest - chunk
    return found, assigned


def merged(ranges: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Neighbours on the same device are one range."""
    joined: list[tuple[int, int, int]] = []
    for device, start, end in ranges:
        if joined and joined[-1][0] == device:
            joined[-1] = (device, joined[-1][1], end)
        else:
            joined.append((device, start, end))
    return joined


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int]:
    """Loads of any kind, and a number of devices that divides the experts."""
    devices, per_device = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    high = draw(st.sampled_from([1, 5, 100, 10**6]))
    return draw(st.lists(st.integers(0, high), min_size=devices * per_device,
                         max_size=devices * per_device)), devices  # fmt: skip


ALPHAS = st.sampled_from([0.5, 0.9, 1.0, 1.1, 1.2, 2.0])
CHUNKS = st.sampled_from([0, 1, 2, 8, 64, 1024])


# -- by hand --------------------------------------------------------------------------------------


def test_one_hot_expert_is_shared_by_all() -> None:
    plan = plan_llep([8, 0, 0, 0], 4, min_tokens=1)
    assert plan.capacity == 2
    assert plan.assignments[0] == ((0, 0, 2), (1, 2, 4), (2, 4, 6), (3, 6, 8))
    assert plan.device_load == (2, 2, 2, 2)
    assert plan.transfers == ((0, 0, 1), (0, 0, 2), (0, 0, 3))
    assert plan_ep([8, 0, 0, 0], 4).device_load == (8, 0, 0, 0)


@pytest.mark.parametrize("min_tokens", [1, 32])
def test_the_owner_keeps_what_fits_beside_its_other_experts(min_tokens: int) -> None:
    plan = plan_llep([80, 10, 5, 5], 2, min_tokens=min_tokens)
    assert (plan.capacity, plan.ratio) == (50, 1.8)
    assert plan.assignments[0] == ((0, 0, 40), (1, 40, 80))
    assert plan.device_load == (50, 50)
    assert plan.transfers == ((0, 0, 1),)


@pytest.mark.parametrize("min_tokens", [1, 8])
def test_the_last_chunk_may_be_small(min_tokens: int) -> None:
    plan = plan_llep([40, 30, 20, 10], 4, min_tokens=min_tokens)
    assert plan.assignments[:2] == (((0, 0, 25), (3, 25, 40)), ((1, 0, 25), (2, 25, 30)))
    assert plan.device_load == (25, 25, 25, 25)
    assert plan.transfers == ((0, 0, 3), (1, 1, 2))
    loose = plan_llep([40, 30, 20, 10], 4, alpha=1.2, min_tokens=min_tokens)
    assert (loose.capacity, len(loose.transfers)) == (30, 1)
    assert loose.device_load == (30, 30, 20, 20)


def test_small_imbalance_is_left_alone() -> None:
    plan = plan_llep([26, 25, 25, 24], 4)
    assert (plan.path, plan.ratio, plan.transfers) == ("ep", 1.04, ())
    planned = plan_llep([26, 25, 25, 24], 4, min_tokens=1, threshold=1.04)
    assert (planned.path, planned.device_load) == ("llep", (25, 25, 25, 25))
    even, native = plan_llep([25] * 4, 4, threshold=None), plan_ep([25] * 4, 4)
    assert even.path == "llep"
    assert (even.assignments, even.transfers) == (native.assignments, ())


def test_a_large_smallest_chunk_forces_tokens_on_one_device() -> None:
    fine, coarse = (plan_llep([97, 1, 1, 1], 4, min_tokens=m) for m in (1, 64))
    assert (fine.device_load, len(fine.transfers)) == ((25, 25, 25, 25), 3)
    assert coarse.device_load == (25, 72, 2, 1)
    assert coarse.transfers == ((0, 0, 1), (1, 1, 2))
    assert coarse.imbalance == 72 / 25


def test_an_owner_may_compute_none_of_its_own_expert() -> None:
    plan = plan_llep([100, 100, 0, 0], 2, min_tokens=1)
    assert plan.assignments == (((1, 0, 100),), ((0, 0, 100),), (), ())
    assert (plan.device_load, plan.transfers) == ((100, 100), ((0, 0, 1),))


def test_the_trigger_looks_at_devices_or_at_experts() -> None:
    loads = [30, 0, 0, 30, 30, 0, 0, 30]
    by_device, by_expert = (plan_llep(loads, 4, trigger=t) for t in ("device", "expert"))
    assert (by_device.path, by_device.ratio) == ("ep", 1.0)
    assert (by_expert.path, by_expert.ratio) == ("llep", 2.0)


def test_a_small_excess_can_stay_where_it_is() -> None:
    loads = [40, 30, 20, 10]
    assert plan_llep(loads, 4, min_tokens=8, keep_small_native=True).assignments[:2] == (
        ((0, 0, 25), (3, 25, 40)),
        ((1, 0, 30),),
    )


def test_no_tokens_and_one_device() -> None:
    for plan in (plan_ep([0, 0], 2), plan_llep([0, 0], 2), plan_llep([0, 0], 2, threshold=None)):
        assert (plan.assignments, plan.device_load, plan.imbalance) == (((), ()), (0, 0), 1.0)
    alone = plan_llep([5, 3], 1, alpha=0.5, threshold=None)
    assert (alone.assignments, alone.transfers) == ((((0, 0, 5),), ((0, 0, 3),)), ())


def test_the_splits_of_the_exchange() -> None:
    counts = [[3, 1], [5, 1]]
    plan = plan_llep([8, 2], 2, min_tokens=1)
    assert plan.assignments[0] == ((0, 0, 5), (1, 5, 8))
    assert send_matrix(counts, plan) == [[3, 1], [2, 4]]
    for wrong in ([[3, 1]], [[3, 1], [6, 1]], [[3, 1], [4, 1]]):
        with pytest.raises(ValueError, match="count"):
            send_matrix(wrong, plan)


def test_a_capacity_below_the_mean_can_be_worse_than_the_native_plan() -> None:
    plan = plan_llep([2, 2], 2, alpha=0.5, min_tokens=1, threshold=None)
    assert (plan.capacity, plan.device_load) == (1, (3, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_devices": 3}, "num_devices=3: must divide the 4 experts"),
        ({"num_devices": 0}, "num_devices=0"),
        ({"num_devices": 8}, "num_devices=8"),
        ({"loads": []}, "must divide the 0 experts"),
        ({"loads": [1, -1]}, "-1 is negative"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"trigger": "rank"}, "trigger='rank': must be one of 'device', 'expert'"),
    ],
)
def test_bad_values_are_named(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_llep(**({"loads": [8, 0, 0, 0], "num_devices": 2} | changes))


# -- laws -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(cases(), ALPHAS, CHUNKS)
def test_it_is_the_algorithm_as_it_is_written(
    case: tuple[list[int], int], alpha: float, min_tokens: int
) -> None:
    loads, devices = case
    plan = plan_llep(loads, devices, alpha, min_tokens, threshold=None)
    ranges, load = as_written(loads, devices, alpha, max(min_tokens, 1))
    assert [list(r) for r in plan.assignments] == [merged(r) for r in ranges]
    assert list(plan.device_load) == load


@settings(deadline=None, max_examples=80)
@given(cases(), ALPHAS, CHUNKS, st.booleans())
def test_ranges_partition_the_tokens_of_any_loads(
    case: tuple[list[int], int], alpha: float, min_tokens: int, keep: bool
) -> None:
    loads, devices = case
    arguments = (loads, devices, alpha, min_tokens, None, "device", keep)
    plan = plan_llep(*arguments)
    computed, moved = [0] * devices, set()
    for expert, load in enumerate(loads):
        position = 0
        for device, start, end in plan.assignments[expert]:
            assert start == position < end
            position = end
            computed[device] += end - start
            owner = expert * devices // len(loads)
            if device != owner:
                moved.add((expert, owner, device))
        assert position == load
    assert tuple(computed) == plan.device_load
    assert sum(computed) == sum(loads)
    assert len(plan.transfers) == len(set(plan.transfers))
    assert set(plan.transfers) == moved
    assert plan_llep(*arguments) == plan


@settings(deadline=None, max_examples=80)
@given(cases(), ALPHAS, CHUNKS)
def test_the_fullest_device_is_bounded_for_any_loads(
    case: tuple[list[int], int], alpha: float, min_tokens: int
) -> None:
    loads, devices = case
    even = plan_llep(loads, devices, 1.0, 1, threshold=None)
    assert max(even.device_load) <= (even.capacity or 0) + sum(loads) % devices
    plan = plan_llep(loads, devices, max(alpha, 1.0), min_tokens, threshold=None)
    assert max(plan.device_load) <= max(*plan_ep(loads, devices).device_load, plan.capacity or 0)


@settings(deadline=None, max_examples=60)
@given(cases(), CHUNKS, st.data())
def test_splits_add_up_for_any_counts(
    case: tuple[list[int], int], min_tokens: int, data: st.DataObject
) -> None:
    loads, devices = case
    cuts = [sorted(data.draw(st.lists(st.integers(0, load), min_size=devices - 1,
                                      max_size=devices - 1))) for load in loads]  # fmt: skip
    ends = [[*cut, load] for cut, load in zip(cuts, loads, strict=True)]
    counts = [[e[r] - (e[r - 1] if r else 0) for e in ends] for r in range(devices)]
    plan = plan_llep(loads, devices, 1.0, min_tokens, threshold=None)
    sends = send_matrix(counts, plan)
    assert [sum(row) for row in sends] == [sum(row) for row in counts]
    assert tuple(map(sum, zip(*sends, strict=True))) == plan.device_load
    assert expected_sends(counts, plan) == sends
    shuffled = data.draw(st.permutations(counts))
    sums = [sum(column) for column in zip(*shuffled, strict=True)]
    assert plan_llep(sums, devices, 1.0, min_tokens, threshold=None) == plan


def expected_sends(counts: Sequence[Sequence[int]], plan: Plan) -> list[list[int]]:
    """By the overlap of what a rank owns with what a device computes."""
    devices = len(plan.device_load)
    sends = [[0] * devices for _ in range(devices)]
    for expert, ranges in enumerate(plan.assignments):
        start = 0
        for rank, row in enumerate(counts):
            end = start + row[expert]
            for r in ranges:
                sends[rank][r.device] += max(0, min(end, r.end) - max(start, r.start))
            start = end
    return sends


def test_chunks_give_the_outputs_and_gradients_of_whole_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    loads, d_model, d_ff = [61, 7, 0, 12], 6, 10
    plan = plan_llep(loads, 4, min_tokens=1)
    assert len(plan.transfers) >= 3
    for load, ranges in zip(loads, plan.assignments, strict=True):
        weights = [torch.randn(s, generator=generator).double().requires_grad_()
                   for s in ((2 * d_ff, d_model), (d_model, d_ff))]  # fmt: skip
        x = torch.randn(load, d_model, generator=generator).double()
        grad = torch.randn(load, d_model, generator=generator).double()
        whole = expert(x, *weights)
        expected = torch.autograd.grad(whole, weights, grad)
        outputs, found = [], [torch.zeros_like(w) for w in weights]
        for _, start, end in ranges:
            copies = [w.detach().clone().requires_grad_() for w in weights]  # where they are lent
            outputs.append(expert(x[start:end], *copies))
            parts = torch.autograd.grad(outputs[-1], copies, grad[start:end])
            found = [total + part for total, part in zip(found, parts, strict=True)]
        split = torch.cat(outputs) if outputs else whole
        torch.testing.assert_close(split, whole, atol=1e-12, rtol=0)
        torch.testing.assert_close(tuple(found), expected, atol=1e-12, rtol=0)


def expert(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """SwiGLU."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def test_thousands_of_devices_are_planned_in_well_below_a_second() -> None:
    for experts, devices in ((512, 512), (8192, 4096)):
        loads = [10**8 // (rank + 1) for rank in range(experts)]
        start = process_time()
        plan = plan_llep(loads, devices)
        assert process_time() - start < 1
        assert plan.imbalance < 1.01 < plan.ratio
