"""DynMoLE's balance loss against the numbers of its reference code."""

import pytest
import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, StepTotals
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.losses.soft_load_balancing import SoftLoadBalancingLoss
from tests.helpers.records import ex_a, record
from tests.helpers.step import padded_against_cut, shares_against_whole


def dense(logits: Tensor, valid: Tensor | None = None, active: int = 2) -> RouterOutput:
    """The ``active`` most probable experts, weights not renormalised."""
    probs = logits.softmax(-1)
    picked = probs.topk(active)
    return RouterOutput.from_top_k(logits, probs, picked.indices, picked.values, valid=valid)


@pytest.mark.parametrize("num_experts", [2, 6])
def test_one_when_uniform(num_experts: int) -> None:
    output = dense(torch.zeros(5, num_experts), active=num_experts)
    assert float(SoftLoadBalancingLoss()(output)) == pytest.approx(1)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_one_at_balance_where_weights_sum_to_one(top_k: int) -> None:
    # token t picks experts t ... t+K-1 with weights 1/K: f = 1/E, and sum_i P_i = 1
    picks = (torch.arange(4)[:, None] + torch.arange(top_k)) % 4
    probs = torch.rand(4, 4).softmax(-1)
    weights = torch.full_like(picks, 1 / top_k, dtype=probs.dtype)
    output = RouterOutput.from_top_k(probs.log(), probs, picks, weights)
    assert float(SoftLoadBalancingLoss()(output)) == pytest.approx(1)


def test_by_hand() -> None:
    # f = [1.45, .55, .5, .6] / 4, P = [1.5, .8, .8, .9] / 4: 4 (2.175 + .44 + .4 + .54) / 16
    assert float(SoftLoadBalancingLoss()(ex_a())) == pytest.approx(3.555 / 4)
    everything = record([[1.0, 0.0, 0.0]] * 2, [[0], [0]])
    assert float(SoftLoadBalancingLoss()(everything)) == pytest.approx(3)


def test_both_factors_carry_gradient() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def by_formula(z: Tensor) -> Tensor:
        p = z.softmax(-1)
        used = p * torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0)
        return 4 * (used.mean(0) * p.mean(0)).sum()

    value = SoftLoadBalancingLoss()(dense(logits))
    (got,) = torch.autograd.grad(value, logits)
    (expected,) = torch.autograd.grad(by_formula(logits), logits)
    torch.testing.assert_close(got, expected)
    (counted,) = torch.autograd.grad(LoadBalancingLoss()(dense(logits)), logits)
    assert (got - counted).abs().max() > 1e-3


def test_invariant_to_relabelling_experts_and_to_a_constant() -> None:
    logits, loss = torch.randn(5, 6, dtype=torch.float64), SoftLoadBalancingLoss()
    expected = loss(dense(logits))
    torch.testing.assert_close(loss(dense(logits[:, torch.randperm(6)])), expected)
    torch.testing.assert_close(loss(dense(logits + 3)), expected)


def test_shares_add_up_in_value_and_gradient() -> None:
    (value, grad), (whole, whole_grad) = shares_against_whole(SoftLoadBalancingLoss(), dense)
    assert whole_grad.abs().max() > 1e-3
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(grad, whole_grad)


def test_padding_changes_nothing() -> None:
    padded, cut = padded_against_cut(SoftLoadBalancingLoss(), dense)
    torch.testing.assert_close(padded, cut)


def test_nothing_but_padding_is_worth_nothing() -> None:
    output = dense(torch.randn(4, 3), valid=torch.zeros(4, dtype=torch.bool))
    assert float(SoftLoadBalancingLoss()(output)) == 0


def test_mistakes_are_named() -> None:
    totals = StepTotals(torch.tensor(4.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"needs totals\.sums"):
        SoftLoadBalancingLoss()(ex_a(), None, totals)
    with pytest.raises(ValueError, match=r"weight=-0.1: must be at least 0"):
        SoftLoadBalancingLoss(weight=-0.1)
