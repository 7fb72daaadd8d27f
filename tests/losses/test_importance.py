"""CV^2 of the summed combine weights, by hand."""

import pytest
import torch

from routerlab.core.routing import StepTotals
from routerlab.losses.importance import ImportanceLoss, cv_squared
from tests.helpers.records import ex_a, record
from tests.helpers.step import padded_against_cut, shares_against_whole


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.0, 2.0], 0.125),  # variance 2/9, mean 4/3
        ([1.5, 0.8, 0.8, 0.9], 0.085),  # .113333 with the unbiased variance
        ([3.0, 2.0, 2.0, 1.0], 0.125),
        ([4.0, 0.0, 0.0, 0.0], 3.0),  # E - 1
        ([5.0, 5.0], 0.0),
        ([0.0, 0.0], 0.0),  # the mean squared is 1e-10 then, not 0
    ],
)
def test_cv_squared(values: list[float], expected: float) -> None:
    value = cv_squared(torch.tensor(values, dtype=torch.float64))
    assert float(value) == pytest.approx(expected, abs=1e-9)


def test_the_gradient_of_cv_squared_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(cv_squared, torch.rand(5, dtype=torch.float64).requires_grad_())


def test_only_sparse_weights_count() -> None:
    # the picked probabilities: I = [1.45, .55, .5, .6], mean .775, variance .6125 / 4
    assert float(ImportanceLoss()(ex_a())) == pytest.approx(0.153125 / 0.600625)


def test_an_expert_that_nobody_picks_counts_as_zero() -> None:
    # one weight of 1 each: I = [2, 0, 0]
    output = record([[1.0, 0.0, 0.0]] * 2, [[0], [0]])
    assert float(ImportanceLoss()(output)) == pytest.approx(2.0)


def test_shares_add_up_in_value_and_gradient() -> None:
    (value, grad), (whole, whole_grad) = shares_against_whole(ImportanceLoss())
    assert whole_grad.abs().max() > 1e-3
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(grad, whole_grad)


def test_padding_changes_nothing() -> None:
    padded, cut = padded_against_cut(ImportanceLoss())
    torch.testing.assert_close(padded, cut)


def test_needs_the_sums_of_the_step() -> None:
    totals = StepTotals(torch.tensor(4.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"needs totals\.sums"):
        ImportanceLoss()(ex_a(), None, totals)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight=-0.1: must be at least 0"):
        ImportanceLoss(weight=-0.1)
