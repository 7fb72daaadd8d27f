"""CV^2 of the smooth load, by hand."""

from dataclasses import replace

import pytest
import torch

from routerlab.losses.load_cv import LoadCVLoss
from tests.helpers.records import record
from tests.helpers.step import padded_against_cut, shares_against_whole


def loss_of(selection_probs: list[list[float]], valid: list[bool] | None = None) -> float:
    rows = torch.tensor(selection_probs, dtype=torch.float64)
    uniform = torch.full_like(rows, 1 / rows.shape[1])
    mask = None if valid is None else torch.tensor(valid)
    output = record(uniform, [[0]] * len(rows), valid=mask)
    return float(LoadCVLoss()(replace(output, selection_probs=rows)))


def test_value_by_hand() -> None:
    # logits [1, .5, 0], K = 1, deviation 1: mean .386218, variance .050331
    assert loss_of([[0.691462, 0.308538, 0.158655]]) == pytest.approx(0.337420, abs=1e-5)


def test_loads_are_summed_over_tokens() -> None:
    # [1, 1, 2]: variance 2/9 over (4/3)^2
    assert loss_of([[0.25, 0.75, 1.0], [0.75, 0.25, 1.0]]) == pytest.approx(0.125)
    assert loss_of([[0.25, 0.75, 1.0], [0.75, 0.25, 0.0]]) == pytest.approx(0.0)


def test_padding_is_not_in_the_load() -> None:
    rows = [[0.25, 0.75, 1.0], [0.75, 0.25, 1.0], [0.9, 0.0, 0.1]]
    assert loss_of(rows, [True, True, False]) == pytest.approx(0.125)
    padded, cut = padded_against_cut(LoadCVLoss())
    torch.testing.assert_close(padded, cut)


def test_the_gradient_by_finite_differences() -> None:
    output = record(torch.full((4, 3), 1 / 3, dtype=torch.float64), [[0]] * 4)
    rows = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda r: LoadCVLoss()(replace(output, selection_probs=r)), rows
    )


def test_shares_add_up_in_value_and_gradient() -> None:
    (value, grad), (whole, whole_grad) = shares_against_whole(LoadCVLoss())
    assert whole_grad.abs().max() > 1e-3
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(grad, whole_grad)


def test_a_record_without_selection_probs_is_refused_with_the_way_out() -> None:
    output = record([[0.5, 0.5]], [[0]])
    for use in (LoadCVLoss(), LoadCVLoss().step_sums):
        with pytest.raises(ValueError, match=r"load_cv needs selection_probs.*router=noisy_top_k"):
            use(output)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight=-0.1: must be at least 0"):
        LoadCVLoss(weight=-0.1)
