"""The router z-loss by hand, and its gradient."""

import math

import pytest
import torch

from routerlab.core.routing import RouterOutput, StepTotals
from routerlab.losses.router_z import RouterZLoss


def output_of(logits: torch.Tensor, valid: torch.Tensor | None = None) -> RouterOutput:
    probs = logits.softmax(-1)
    picked = probs.topk(1)
    return RouterOutput.from_top_k(logits, probs, picked.indices, picked.values, valid=valid)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([[0.0, 0.0]], 0.480453),  # (ln 2)^2
        ([[1.0, 1.0]], 2.866747),  # (1 + ln 2)^2: not shift-invariant
        ([[0.0] * 4], 1.921812),  # (ln 4)^2
        ([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], 1.806965),  # a mean
    ],
)
def test_values(logits: list[list[float]], expected: float) -> None:
    value = RouterZLoss()(output_of(torch.tensor(logits, dtype=torch.float64)))
    assert float(value) == pytest.approx(expected, abs=1e-6)


def test_gradient() -> None:  # (2/T) LSE_t softmax(z_t)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    RouterZLoss()(output_of(logits)).backward()
    z = logits.detach()
    expected = 2 / 5 * z.logsumexp(-1, keepdim=True) * z.softmax(-1)
    torch.testing.assert_close(logits.grad, expected)


def test_padding_changes_nothing() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    valid = torch.tensor([True, False, True, True, False])
    padded = logits.clone()
    padded[~valid] = 1e9
    a, b = RouterZLoss()(output_of(padded, valid)), RouterZLoss()(output_of(logits[valid]))
    assert torch.equal(a, b)
    nothing = output_of(logits, torch.zeros(5, dtype=torch.bool))
    assert float(RouterZLoss()(nothing)) == 0


def test_shares_add_up_to_the_whole() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64)
    totals, loss = StepTotals(torch.tensor(6.0), torch.tensor(1.0)), RouterZLoss()
    parts = [loss(output_of(part), None, totals) for part in (logits[:1], logits[1:])]
    torch.testing.assert_close(sum(parts), loss(output_of(logits)))


def test_large_logits_stay_finite() -> None:
    value = RouterZLoss()(output_of(torch.full((2, 4), 1e4)))
    assert float(value) == pytest.approx((1e4 + math.log(4)) ** 2, rel=1e-6)


def test_needs_no_counts() -> None:
    assert not RouterZLoss(weight=0.5).needs_step_sums
    assert RouterZLoss(weight=0.5).weight == 0.5
