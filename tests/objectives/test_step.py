"""The pieces of a step and its sums."""

from dataclasses import replace

import pytest
import torch

from routerlab.core.routing import RoutingContext
from routerlab.objectives.router_state import state_sums
from routerlab.objectives.step import (
    split_batch,
    step_totals,
    sum_over_step,
    world_size,
)
from tests.helpers.models import tiny_batch
from tests.helpers.records import ex_a


@pytest.mark.parametrize(("micro_batches", "sizes"), [(1, [8]), (3, [3, 3, 2]), (8, [1] * 8)])
def test_split_batch(micro_batches: int, sizes: list[int]) -> None:
    batch = tiny_batch(8)
    parts = split_batch(batch, micro_batches)
    assert [len(part["input_ids"]) for part in parts] == sizes
    for key, value in batch.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value)


def test_too_many_micro_batches() -> None:
    with pytest.raises(ValueError, match=r"micro_batches=9: must be at most the 8 sequences"):
        split_batch(tiny_batch(8), 9)


def test_step_totals_by_hand() -> None:
    contexts = [
        RoutingContext(2, 3, valid=torch.tensor([True, True, False, False, False, False])),
        RoutingContext(2, 3),
    ]
    totals, targets = step_totals(contexts, torch.tensor(5))
    # 2 + 6 tokens; 1 sequence with a token and one without, plus 2
    assert (totals.num_tokens, totals.num_sequences, targets) == (8, 3, 5)


def test_totals_are_divided_by_so_they_are_never_zero() -> None:
    context = RoutingContext(1, 2, valid=torch.tensor([False, False]))
    totals, targets = step_totals([context], torch.tensor(0))
    assert (totals.num_tokens, totals.num_sequences, targets) == (1, 1, 1)


def test_sums_over_micro_batches() -> None:
    parts = [{("a", "l"): torch.tensor([1, 2]), ("b", "l"): torch.tensor([0.5])}] * 2
    parts.append({("a", "l"): torch.tensor([1, 0]), ("b", "l"): torch.tensor([2.0])})
    found = sum_over_step(parts)
    assert {k: v.tolist() for k, v in found.items()} == {("a", "l"): [3, 4], ("b", "l"): [3.0]}
    assert sum_over_step(parts, mean=True)["b", "l"].tolist() == [1.0]
    assert sum_over_step([{}, {}]) == {}


def test_only_records_with_a_proposal_have_state() -> None:
    output = ex_a()
    assert state_sums({"l": output}) == {}
    told = state_sums({"l": replace(output, proposal=torch.tensor([1.0, 2.0]))})
    assert told["requests", "l"].tolist() == [3, 2, 2, 1]
    assert told["proposal", "l"].tolist() == [1.0, 2.0]


def test_one_process_by_default() -> None:
    assert world_size() == 1
