"""The mutual information of token and expert, by hand and over micro-batches."""

import math

import pytest
import torch

from routerlab.core.routing import StepTotals
from routerlab.losses.mutual_information import MutualInformationLoss
from tests.helpers.records import EX_A_PROBS, ex_a, record
from tests.helpers.step import padded_against_cut, shares_against_whole, top_k_output


def test_value_of_the_running_example() -> None:
    assert float(MutualInformationLoss()(ex_a())) == pytest.approx(-0.205596, abs=1e-6)


def test_equals_the_mean_divergence_from_the_mean() -> None:
    p = torch.tensor(EX_A_PROBS, dtype=torch.float64)
    divergence = (p * (p / p.mean(0)).log()).sum(-1).mean()
    assert float(MutualInformationLoss()(ex_a())) == pytest.approx(-float(divergence), abs=1e-12)


def test_the_ends_of_its_range() -> None:
    loss = MutualInformationLoss()
    alike = record([[0.7, 0.2, 0.1]] * 4, [[0]] * 4)
    assert float(loss(alike)) == pytest.approx(0, abs=1e-12)
    certain = record(torch.eye(4, dtype=torch.float64), [[0]] * 4)
    assert float(loss(certain)) == pytest.approx(-math.log(4))
    collapsed = record([[1.0, 0.0]] * 3, [[0]] * 3)
    assert float(loss(collapsed)) == 0


def test_micro_batches_are_seen_together() -> None:
    # each alone has no information; together H(.5, .5) - H(.9, .1) = .693147 - .325083
    loss = MutualInformationLoss()
    parts = [record([[0.9, 0.1]] * 2, [[0]] * 2), record([[0.1, 0.9]] * 2, [[1]] * 2)]
    assert [float(loss(part)) for part in parts] == pytest.approx([0, 0], abs=1e-12)
    sums = torch.stack([loss.step_sums(part) for part in parts]).sum(0)
    totals = StepTotals(torch.tensor(4.0), torch.tensor(2.0), sums)
    shares = [float(loss(part, None, totals)) for part in parts]
    assert sum(shares) == pytest.approx(-0.368064, abs=1e-6)


def test_gradient_in_closed_form() -> None:
    # dL/dp_ti = (ln P_i - ln p_ti) / T, then through the softmax
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    MutualInformationLoss()(top_k_output(logits)).backward()
    p = logits.detach().softmax(-1)
    slope = (p.mean(0).log() - p.log()) / 5
    expected = p * (slope - (p * slope).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected)


def test_gradient_is_finite_where_probabilities_are_zero() -> None:
    logits = torch.tensor([[1e4, -1e4, -1e4], [1e4, -1e4, 1e4]], requires_grad=True)
    MutualInformationLoss()(top_k_output(logits)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_shares_add_up_in_value_and_gradient() -> None:
    (value, grad), (whole, whole_grad) = shares_against_whole(MutualInformationLoss())
    assert whole_grad.abs().max() > 1e-3
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(grad, whole_grad)


def test_padding_changes_nothing() -> None:
    padded, cut = padded_against_cut(MutualInformationLoss())
    torch.testing.assert_close(padded, cut)


def test_nothing_but_padding_is_worth_nothing() -> None:
    output = record([[0.9, 0.1]] * 2, [[0]] * 2, valid=torch.zeros(2, dtype=torch.bool))
    assert float(MutualInformationLoss()(output)) == 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight=-0.1: must be at least 0"):
        MutualInformationLoss(weight=-0.1)
    totals = StepTotals(torch.tensor(4.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"needs totals\.sums"):
        MutualInformationLoss()(ex_a(), None, totals)
