"""Which experts a domain activates: numbers by hand."""

import pytest
import torch

from routerlab.analysis.activation import (
    activation_difference,
    activation_frequency,
    experts_above,
)
from routerlab.core.routing import RouterOutput, RoutingContext
from tests.helpers.records import random_record, record


def sent_to(rows: list[list[int]]) -> tuple[RouterOutput, RoutingContext]:
    """Top-1 of three experts for sequences of unequal length, padded on the right."""
    length = max(map(len, rows))
    valid = torch.tensor([[i < len(row) for i in range(length)] for row in rows]).flatten()
    picks = [[expert] for row in rows for expert in (row + [0] * length)[:length]]
    found = record([[1 / 3] * 3] * len(picks), picks, valid=valid)
    return found, RoutingContext(len(rows), length, valid=valid)


def test_differences_of_sequence_means() -> None:
    task = activation_frequency(*sent_to([[0, 0, 0, 1], [1, 1]]))
    baseline = activation_frequency(*sent_to([[0, 1, 1, 2], [0, 2]]))
    assert task.mean(0).tolist() == pytest.approx([0.375, 0.625, 0])
    assert baseline.mean(0).tolist() == pytest.approx([0.375, 0.25, 0.375])
    difference = activation_difference(task, baseline)
    assert difference.tolist() == pytest.approx([0, 0.375, -0.375])
    assert experts_above({"layers.03.moe": difference, "layers.04.moe": -difference}, 0.3) == {
        3: [1],
        4: [2],
    }
    assert experts_above({"layers.03.moe": difference}, 0.4) == {}


def test_sums() -> None:
    context = RoutingContext(4, 6)
    one, other = (activation_frequency(random_record(24, 5, 2, seed), context) for seed in (0, 1))
    assert one.sum(1).tolist() == pytest.approx([2.0] * 4)
    assert float(activation_difference(one, other).sum()) == pytest.approx(0, abs=1e-6)


def test_a_threshold_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold=2: must be at least -1 and at most 1"):
        experts_above({}, 2)
