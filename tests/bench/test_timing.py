"""Ratio arithmetic, on clocks that tell a known time."""

import gc

import pytest
import torch

from routerlab.bench.memory import highest, peak_mib, saved_mib
from routerlab.bench.timing import MIN_ROUNDS, Sample, interleave, summary

MIB = 2**20


class FakeClock:
    """Time that only work advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float):
        def run() -> None:
            self.now += seconds

        return run


def quiet(*seconds: float) -> tuple[Sample, ...]:
    return tuple(Sample(float(s)) for s in seconds)


def test_a_ratio_is_a_sample_over_the_mean_of_its_two_neighbours():
    # 3 / 1 = 3, 3 / 2 = 1.5, 4 / ((1 + 3) / 2) = 2
    found = summary([quiet(1, 3, 1), quiet(2, 3, 2), quiet(1, 4, 3)])
    assert found.median == 2
    assert (found.lower, found.upper) == (1.75, 2.5)
    assert found.milliseconds == 3000
    assert (found.samples, found.busy) == (3, 0)


def test_samples_that_waited_for_a_core_are_dropped():
    calm = [quiet(1, 2, 1)] * MIN_ROUNDS
    disturbed = (Sample(1.0), Sample(9.0, waited=1.0), Sample(1.0))
    found = summary([*calm, disturbed])
    assert (found.median, found.upper) == (2, 2)
    assert (found.samples, found.busy) == (MIN_ROUNDS, 1)
    neighbour = (Sample(1.0, waited=0.5), Sample(9.0), Sample(1.0))
    assert summary([*calm, neighbour]).busy == 1


def test_with_too_few_quiet_samples_all_are_used():
    disturbed = (Sample(1.0), Sample(4.0, waited=1.0), Sample(1.0))
    found = summary([quiet(1, 2, 1), disturbed, disturbed])
    assert (found.median, found.samples, found.busy) == (4, 3, 0)


def test_contestants_take_turns_with_the_baseline():
    clock, order = FakeClock(), []

    def work(name: str, seconds: float):
        run = clock.work(seconds)
        return lambda: (order.append(name), run())

    prepared = []
    found, milliseconds = interleave(
        {"slow": work("s", 3.0), "fast": work("f", 0.5)},
        work("b", 2.0),
        lambda: prepared.append(clock.now),
        seconds=1e-9,
        clock=clock,
    )
    assert "".join(order) == "bsf" + "b" + "sbfb" * MIN_ROUNDS
    assert len(prepared) == len(order)
    assert milliseconds == 2000
    assert (found["slow"].median, found["fast"].median) == (1.5, 0.25)


def test_rounds_go_on_for_the_given_time():
    clock = FakeClock()
    found, _ = interleave({"c": clock.work(1.0)}, clock.work(1.0), lambda: None, 20.0, clock=clock)
    assert found["c"].samples + found["c"].busy == 10  # two seconds a round


def test_the_garbage_collector_is_off_while_timing_and_on_again_after_an_error():
    seen = []

    def work() -> None:
        seen.append(gc.isenabled())
        if len(seen) == 5:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        interleave({"c": work}, work, lambda: None, 1.0)
    assert not any(seen)
    assert gc.isenabled()


def test_seconds_must_be_positive():
    with pytest.raises(ValueError, match="seconds=0"):
        interleave({}, lambda: None, lambda: None, 0.0)


def test_peak_counts_what_is_held_at_one_time():
    assert highest([4, -4, 3, 3, -6]) == 6
    kept = torch.zeros(MIB // 4)  # there before: not counted

    def work() -> None:
        a = torch.zeros(2 * MIB // 4)
        b = a + 1
        del a
        torch.zeros(MIB // 4)
        del b

    assert peak_mib(work, kept.device) == pytest.approx(4, abs=1e-3)


def test_saved_counts_storages_once_and_leaves_parameters_out():
    weight = torch.nn.Parameter(torch.zeros(MIB // 4))
    x = torch.zeros(MIB // 4)
    assert saved_mib(lambda: (x * weight) + (x.view(-1) * weight), [weight]) == 1
    # exp saves its result, the two products x * weight and exp * exp no other
    assert saved_mib(lambda: (x * weight).exp().square(), [weight]) == 2
