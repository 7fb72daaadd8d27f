"""LoRA-Mixer's loss by hand, with both signs of its entropy."""

import math

import pytest
import torch

from routerlab.core.routing import RouterOutput, StepTotals
from routerlab.losses.routing_specialization import RoutingSpecializationLoss
from tests.helpers.records import record
from tests.helpers.step import padded_against_cut, shares_against_whole, top_k_output

ROWS = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]]
SIGNS = (-1, 1)


def soft(probs: list[list[float]]) -> RouterOutput:
    """All experts of every token."""
    return record(probs, [list(range(len(probs[0])))] * len(probs))


def value(probs: list[list[float]], alpha: float = 1.0, lam: float = 0.1, **how) -> float:
    return float(RoutingSpecializationLoss(1.0, alpha, lam, **how)(soft(probs)))


def test_both_terms_and_both_signs() -> None:
    loss = RoutingSpecializationLoss()
    assert loss.step_sums(soft(ROWS)).tolist() == [1, 1, 1]
    means = soft(ROWS).router_probs.mean(0).tolist()
    assert means == pytest.approx([0.35, 0.416667, 0.233333], abs=1e-6)
    assert value(ROWS, lam=0.0) == pytest.approx(0.333333, abs=1e-6)
    assert value(ROWS, alpha=0.0, lam=1.0, entropy_sign=1) == pytest.approx(0.826857, abs=1e-6)
    assert value(ROWS) == pytest.approx(0.250648, abs=1e-6)
    assert value(ROWS, entropy_sign=1) == pytest.approx(0.416019, abs=1e-6)


def test_what_each_sign_prefers() -> None:
    uniform, sharp = [[1 / 3] * 3] * 3, torch.eye(3).tolist()
    printed, intended = (
        [value(probs, entropy_sign=sign) for probs in (uniform, sharp)] for sign in SIGNS
    )
    assert printed == pytest.approx([0.223472, 0.333333], abs=1e-6)
    assert intended == pytest.approx([0.443195, 0.333333], abs=1e-6)


@pytest.mark.parametrize("num_experts", [2, 5])
def test_balance_is_one_over_e(num_experts: int) -> None:
    balanced = torch.eye(num_experts).tolist()
    assert value(balanced, lam=0.0) == pytest.approx(1 / num_experts)
    assert value(balanced[:1] * 4, lam=0.0) == pytest.approx(1)  # one expert has it all


def test_the_printed_sign_lowers_the_top_logit() -> None:
    logits = torch.tensor([ROWS[0]], dtype=torch.float64).log().requires_grad_()
    for sign in SIGNS:
        loss = RoutingSpecializationLoss(1.0, 0.0, 1.0, entropy_sign=sign)
        (grad,) = torch.autograd.grad(loss(top_k_output(logits)), logits)
        expected = [sign * g for g in (-0.311601, 0.161524, 0.150077)]
        assert grad[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_shares_of_the_first_k() -> None:
    # preferred two: {0, 1}, {1, 0 or 2}, {2, 0 or 1}; ties go to one of them
    probs = [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]]
    loss = RoutingSpecializationLoss(1.0, 1.0, 0.0, f_mode="topk", top_k=2)
    assert loss.step_sums(soft(probs)).tolist() == [2, 3, 1]
    mean = [0.3, 1.3 / 3, 0.8 / 3]
    assert float(loss(soft(probs))) == pytest.approx((2 * mean[0] + 3 * mean[1] + mean[2]) / 6)
    with pytest.raises(ValueError, match="top_k=4: must be at least 1 and at most 3"):
        RoutingSpecializationLoss(f_mode="topk", top_k=4)(soft(probs))


def test_counts_carry_no_gradient() -> None:
    probs = torch.tensor(ROWS, dtype=torch.float64, requires_grad=True)
    output = RouterOutput.from_top_k(probs.log(), probs, torch.zeros(3, 1).long(), probs[:, :1])
    RoutingSpecializationLoss(1.0, 1.0, 0.0)(output).backward()
    torch.testing.assert_close(probs.grad, torch.full_like(probs, 1 / 9))  # f_i / T


@pytest.mark.parametrize("f_mode", ["top1", "topk"])
def test_shares_add_up_in_value_and_gradient(f_mode: str) -> None:
    loss = RoutingSpecializationLoss(1.0, 1.0, 0.1, f_mode=f_mode)
    (value, grad), (whole, whole_grad) = shares_against_whole(loss)
    assert whole_grad.abs().max() > 1e-3
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(grad, whole_grad)


@pytest.mark.parametrize("f_mode", ["top1", "topk"])
def test_padding_changes_nothing(f_mode: str) -> None:
    padded, cut = padded_against_cut(RoutingSpecializationLoss(1.0, 1.0, 0.1, f_mode=f_mode))
    torch.testing.assert_close(padded, cut)


def test_mistakes_are_named() -> None:
    totals = StepTotals(torch.tensor(4.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"needs totals\.sums"):
        RoutingSpecializationLoss()(soft(ROWS), None, totals)
    with pytest.raises(ValueError, match="entropy_sign=0: must be one of -1, 1"):
        RoutingSpecializationLoss(entropy_sign=0)
    with pytest.raises(ValueError, match="f_mode='all': must be one of 'top1', 'topk'"):
        RoutingSpecializationLoss(f_mode="all")
    with pytest.raises(ValueError, match="entropy_weight=-1.0: must be at least 0"):
        RoutingSpecializationLoss(entropy_weight=-1.0)
    with pytest.raises(ValueError, match=rf"alpha={math.inf}: must be at least 0"):
        RoutingSpecializationLoss(alpha=math.inf)
