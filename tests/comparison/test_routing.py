"""Agreement of two routings and change of one, on examples that can be worked out by hand."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from routerlab.analysis import trace
from routerlab.comparison import routing
from routerlab.comparison.matching import best_matching
from tests.helpers.traces import random_sets, table, traced

# Four tokens before and after (docstring numbers of the test that uses them).
BEFORE = [{0, 1}, {0, 1}, {2, 3}, {0, 2}]
AFTER = [{0, 1}, {0, 2}, {2, 3}, {1, 3}]


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (5, 5), (6, 6), (3, 5), (5, 3)])
def test_the_matching_is_the_best_of_all(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(shape))
    for _ in range(20):
        co_use = rng.integers(0, 50, shape)
        partners = best_matching(co_use)
        kept = partners[partners >= 0]
        assert len(set(kept.tolist())) == len(kept) == min(shape)
        short, long = (co_use, shape[1]) if shape[0] <= shape[1] else (co_use.T, shape[0])
        best = max(
            sum(short[e, f] for e, f in enumerate(order))
            for order in itertools.permutations(range(long), len(short))
        )
        assert sum(co_use[e, f] for e, f in enumerate(partners) if f >= 0) == best


def test_overlap_of_sets_worked_out() -> None:
    """Common experts 2, 1, 2, 0 of two each: (2 + 1 + 2 + 0) / 8."""
    assert routing.overlap(table(BEFORE, 4), table(AFTER, 4)) == 0.625


def test_overlap_of_sets_of_different_sizes_worked_out() -> None:
    """{0} and {0, 1}: 2/3; {0, 1, 2} and {}: 0; {} and {}: left out; {3} and {3}: 1."""
    one = table([{0}, {0, 1, 2}, set(), {3}], 4)
    other = table([{0, 1}, set(), set(), {3}], 4)
    assert routing.overlap(one, other) == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert math.isnan(routing.overlap(one[2:3], other[2:3]))


def test_churn_and_saturation_worked_out() -> None:
    steps = {10: BEFORE, 20: AFTER, 30: AFTER}
    found = routing.history({step: traced(table(sets, 4)) for step, sets in steps.items()})
    assert found.steps == [10, 20, 30]
    assert found.layers == ["layers.00"]
    assert found.churn.tolist() == [[0.375], [0.0]]
    assert found.changed.tolist() == [[0.5], [0.0]]
    assert found.saturation.tolist() == [[0.625], [1.0], [1.0]]


def test_a_routing_agrees_with_itself() -> None:
    same = traced(random_sets(64, 8, 2, seed=0), random_sets(64, 8, 1, seed=1))
    for found in routing.agreement(same, same):
        assert found.agreement == found.above_chance == 1.0
        assert found.partners.tolist() == list(range(8))
        assert found.chance < 0.6


def test_names_of_experts_do_not_matter() -> None:
    chosen = random_sets(256, 8, 2, seed=0)
    names = np.random.default_rng(1).permutation(8)  # expert e is called names[e] over there
    renamed = np.zeros_like(chosen)
    renamed[:, names] = chosen
    [found] = routing.agreement(traced(chosen), traced(renamed))
    assert found.agreement == found.above_chance == 1.0
    assert found.partners.tolist() == names.tolist()


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (8, 2), (16, 4)])
def test_independent_routings_agree_as_chance_does(num_experts: int, top_k: int) -> None:
    """And chance of even loads is top_k / E, though the matching itself was fitted to noise."""
    one = traced(random_sets(4096, num_experts, top_k, seed=0))
    other = traced(random_sets(4096, num_experts, top_k, seed=1))
    [found] = routing.agreement(one, other)
    assert found.chance == pytest.approx(top_k / num_experts, abs=0.02)
    assert found.above_chance == pytest.approx(0, abs=0.03)


def test_collapsed_routings_are_not_said_to_agree() -> None:
    """Both send 90% of the tokens to one expert, each for reasons of its own: 0.82 by chance."""
    rng = np.random.default_rng(0)
    sets = [[{0} if x < 0.9 else {1} for x in rng.random(4096)] for _ in range(2)]
    [found] = routing.agreement(traced(table(sets[0], 2)), traced(table(sets[1], 2)))
    assert found.agreement == pytest.approx(0.82, abs=0.03)
    assert found.chance == pytest.approx(0.82, abs=0.03)
    assert found.above_chance == pytest.approx(0, abs=0.1)


def test_half_of_the_tokens_in_common_worked_out() -> None:
    """Of two experts: equal on half of the tokens, else at random: 3/4, and 1/2 above chance."""
    rng = np.random.default_rng(0)
    first, coin = rng.integers(0, 2, 8192), rng.random(8192) < 0.5
    second = np.where(coin, first, rng.integers(0, 2, 8192))
    [found] = routing.agreement(
        traced(np.eye(2, dtype=bool)[first]), traced(np.eye(2, dtype=bool)[second])
    )
    assert found.agreement == pytest.approx(0.75, abs=0.02)
    assert found.above_chance == pytest.approx(0.5, abs=0.04)


def test_different_numbers_of_experts_worked_out() -> None:
    """Expert 0 of the one side is split in two on the other: a third of the tokens cannot agree."""
    one = traced(table([{0}, {0}, {1}] * 400, 2))
    other = traced(table([{0}, {2}, {1}] * 400, 3))
    [there], [back] = routing.agreement(one, other), routing.agreement(other, one)
    assert there.agreement == back.agreement == pytest.approx(2 / 3, abs=0.01)
    assert sorted(back.partners.tolist()) == [-1, 0, 1]
    assert there.partners[1] == 1


def test_unused_experts_and_tokens_are_no_obstacle() -> None:
    chosen = random_sets(64, 4, 1, seed=0)
    chosen[:16] = False
    chosen = np.concatenate([chosen, np.zeros((64, 2), dtype=bool)], axis=1)
    [found] = routing.agreement(traced(chosen), traced(chosen))
    assert found.above_chance == 1.0
    [nothing] = routing.agreement(traced(chosen & False), traced(chosen & False))
    assert math.isnan(nothing.agreement)
    assert math.isnan(nothing.above_chance)


def test_all_tokens_to_all_experts_is_no_agreement() -> None:
    everything = traced(np.ones((64, 4), dtype=bool))
    [found] = routing.agreement(everything, everything)
    assert found.agreement == found.chance == 1.0
    assert math.isnan(found.above_chance)


def test_chance_is_drawn_from_a_seed() -> None:
    one, other = (traced(random_sets(64, 8, 2, seed=i)) for i in (0, 1))
    chances = [routing.agreement(one, other, seed=seed)[0].chance for seed in (0, 0, 1)]
    assert chances[0] == chances[1] != chances[2]


def test_what_cannot_be_compared_says_why() -> None:
    chosen = random_sets(32, 4, 1, seed=0)
    pairs = {
        "different tokens": (traced(chosen), traced(chosen, first_token=1)),
        "different tokens ": (traced(chosen), traced(chosen, sequences=2)),
        "1 and 2 layers": (traced(chosen), traced(chosen, chosen)),
        "one sequence": (traced(chosen, sequences=1), traced(chosen, sequences=1)),
    }
    for reason, (one, other) in pairs.items():
        with pytest.raises(ValueError, match=reason.strip()):
            routing.agreement(one, other)
    with pytest.raises(ValueError, match="different tokens"):
        routing.history({1: traced(chosen), 2: traced(chosen, first_token=1)})


def test_from_run_directories(tmp_path: Path) -> None:
    sides = [tmp_path / "one", tmp_path / "other"]
    for seed, side in enumerate(sides):
        chosen = traced(random_sets(64, 4, 2, seed=seed))
        trace.save(side / "traces" / "validation.safetensors", chosen)
    found = routing.routing_agreement(*sides)
    expected = routing.agreement(trace.load(sides[0]), trace.load(sides[1]))
    assert (found[0].agreement, found[0].chance) == (expected[0].agreement, expected[0].chance)
    with pytest.raises(ValueError, match="no such trace"):
        routing.routing_agreement(sides[0], tmp_path)


def test_history_of_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 traces at validations, and it takes two"):
        routing.routing_history(tmp_path)
    tables = {step: random_sets(64, 4, 2, seed=step) for step in range(90, 110, 2)}
    for step, chosen in tables.items():
        trace.save(tmp_path / "traces" / f"step_{step:06d}.safetensors", traced(chosen))
    found = routing.routing_history(tmp_path)
    assert found.steps == list(tables)
    assert found.churn[0, 0] == pytest.approx(1 - routing.overlap(tables[90], tables[92]))
    thinned = routing.routing_history(tmp_path, most=4)
    assert thinned.steps == [90, 96, 102, 108]
    assert thinned.saturation[0, 0] == found.saturation[0, 0]


def test_seeds_of_a_real_router_agree_more_than_chance(
    train: Callable[..., Path], finished_run: Path
) -> None:
    """Two runs of the same words are one routing; hash routing does not depend on the seed."""
    same = routing.routing_agreement(finished_run, finished_run)
    assert [part.above_chance for part in same] == [1.0, 1.0]
    hashed = [train("router=hash", f"seed={seed}", "name=hashed") for seed in (0, 1)]
    assert [part.agreement for part in routing.routing_agreement(*hashed)] == [1.0, 1.0]
