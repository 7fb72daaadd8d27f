"""RLOO: coefficients by hand, and its mean and variance by enumerating every draw."""

from itertools import permutations, product

import pytest
import torch
from torch import Tensor

from routerlab.estimators.rloo import reward_to_go, rloo_advantages, rloo_surrogate
from routerlab.ops.plackett_luce import ordered_log_prob

LOGITS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
PAIRS = list(permutations(range(3), 2))
LOSSES = {frozenset({0, 1}): 1.0, frozenset({0, 2}): 2.0, frozenset({1, 2}): 4.0}


def table() -> tuple[Tensor, Tensor, Tensor]:
    """Of every ordered pair: its probability, its loss, and the gradient of its log-probability."""
    logits = LOGITS.clone().requires_grad_()
    log_probs = ordered_log_prob(logits.expand(len(PAIRS), -1), torch.tensor(PAIRS))
    grads = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in log_probs]
    losses = torch.tensor([LOSSES[frozenset(pair)] for pair in PAIRS], dtype=torch.float64)
    return log_probs.exp().detach(), losses, torch.stack(grads)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 2.0, 3.0, 6.0], [-2 / 3, -1 / 3, 0.0, 1.0]),
        ([1.0, 2.0], [-0.5, 0.5]),
        ([3.0, 3.0, 3.0], [0.0, 0.0, 0.0]),
    ],
)
def test_coefficients(losses: list[float], expected: list[float]) -> None:
    got = rloo_advantages(torch.tensor(losses, requires_grad=True))
    torch.testing.assert_close(got, torch.tensor(expected))
    assert not got.requires_grad


def test_each_input_has_its_own_baseline() -> None:
    losses = torch.rand(4, 3, 5, dtype=torch.float64)
    got = rloo_advantages(losses)
    for m in range(4):  # 1/M of the difference from the mean of the others
        others = (losses.sum(0) - losses[m]) / 3
        torch.testing.assert_close(got[m], (losses[m] - others) / 4)
    moved = rloo_advantages(losses + torch.rand(3, 5, dtype=torch.float64))
    torch.testing.assert_close(moved, got)


@pytest.mark.parametrize("num_samples", [3, 5, 8, 32])
def test_equal_losses_give_exactly_nothing(num_samples: int) -> None:
    losses = torch.rand(1, 200).expand(num_samples, -1)
    assert (losses.mean(0) != losses[0]).any()  # which rounding alone would not give
    assert not rloo_advantages(losses).any()


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        rloo_advantages(torch.ones(1, 3))


def test_the_surrogate_has_the_gradient_of_the_estimator() -> None:
    log_probs = torch.randn(3, 2, requires_grad=True)
    losses = torch.rand(3, 2, requires_grad=True)
    value = rloo_surrogate(log_probs, losses)
    assert value.shape == (2,)
    value.sum().backward()
    torch.testing.assert_close(log_probs.grad, rloo_advantages(losses))
    assert losses.grad is None  # a worse draw is made rarer, the loss itself is not touched


def test_descent_makes_a_worse_draw_rarer() -> None:
    log_probs = torch.zeros(2, requires_grad=True)
    rloo_surrogate(log_probs, torch.tensor([5.0, 1.0])).backward()
    assert log_probs.grad[0] > 0 > log_probs.grad[1]


@pytest.mark.parametrize(("num_samples", "variance"), [(2, 1.54626), (3, 0.75099)])
def test_unbiased(num_samples: int, variance: float) -> None:
    chances, losses, grads = table()
    assert (chances * losses).sum().item() == pytest.approx(1.8071429, abs=1e-7)
    draws = torch.tensor(list(product(range(len(PAIRS)), repeat=num_samples))).T  # [M, 6^M]
    weight = chances[draws].prod(0)
    estimates = torch.einsum("mn,mnz->nz", rloo_advantages(losses[draws]), grads[draws])
    mean = (weight[:, None] * estimates).sum(0)
    exact = torch.tensor([-0.4809949, -0.01125, 0.4922449], dtype=torch.float64)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-7)
    total = (weight * (estimates - mean).square().sum(-1)).sum().item()
    assert total == pytest.approx(variance, abs=1e-5)


def test_without_a_baseline_the_variance_is_larger() -> None:
    # the same two draws, coefficients l / M
    chances, losses, grads = table()
    draws = torch.tensor(list(product(range(len(PAIRS)), repeat=2))).T
    estimates = torch.einsum("mn,mnz->nz", losses[draws] / 2, grads[draws])
    weight = chances[draws].prod(0)
    mean = (weight[:, None] * estimates).sum(0)
    total = (weight * (estimates - mean).square().sum(-1)).sum().item()
    assert total == pytest.approx(3.43981, abs=1e-5)


def test_reward_to_go() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, 0.0]])
    assert reward_to_go(losses).tolist() == [[7.0, 6.0, 4.0], [3.0, 3.0, 0.0]]


def test_reward_to_go_is_unbiased_with_less_variance() -> None:
    # two positions draw from q; the loss at 0 knows its draw, the loss at 1 knows both: all 9
    # draws of a sample, all 81 of two samples
    q = LOGITS.exp()
    eye = torch.eye(3, dtype=torch.float64)
    pairs = torch.tensor(list(product(range(3), repeat=2)))  # [9, position]
    first = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    second = torch.tensor([[0.5, 1, 2], [3, 1, 0], [1, 5, 2]], dtype=torch.float64)
    losses = torch.stack([first[pairs[:, 0]], second[pairs[:, 0], pairs[:, 1]]], -1)  # [9, S]
    chances = q[pairs].prod(-1)
    grads = eye[pairs] - q  # [9, S, 3]: d log q / d logits, position by position
    exact = (chances[:, None] * losses.sum(-1, keepdim=True) * grads.sum(1)).sum(0)
    draws = torch.tensor(list(product(range(9), repeat=2))).T  # [M, 81]
    weight, variances = chances[draws].prod(0), []
    for credit in (reward_to_go(losses), losses.sum(-1, keepdim=True).expand(-1, 2)):
        estimates = torch.einsum("mns,mnsz->nz", rloo_advantages(credit[draws]), grads[draws])
        mean = (weight[:, None] * estimates).sum(0)
        torch.testing.assert_close(mean, exact)
        variances.append((weight * (estimates - mean).square().sum(-1)).sum().item())
    assert variances[0] < 0.9 * variances[1]
