"""Entropies over those of the uniform distribution, against the formulas written out."""

import math

import pytest
import torch

from routerlab.ops.entropy import entropy, renyi_entropy, tsallis_entropy

PROBS = torch.tensor([0.3, 0.2, 0.15, 0.14, 0.11, 0.10], dtype=torch.float64)


def test_shannon() -> None:
    expected = -sum(p * math.log(p) for p in PROBS.tolist())
    assert float(entropy(PROBS)) == pytest.approx(expected)
    zeros = torch.tensor([1.0, 0.0], requires_grad=True)
    entropy(zeros).backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize("a", [0.5, 1.1, 2.0])
def test_renyi(a: float) -> None:
    expected = math.log(sum(p**a for p in PROBS.tolist())) / (1 - a) / math.log(6)
    assert float(renyi_entropy(PROBS, a, 0.0)) == pytest.approx(expected)
    assert float(renyi_entropy(torch.full((4,), 0.25), a, 0.0)) == pytest.approx(1, abs=1e-6)
    assert float(renyi_entropy(torch.eye(4)[0], a, 0.0)) == pytest.approx(0, abs=1e-6)


def test_collision_entropy_of_two_halves() -> None:
    # a = 2: -ln sum p^2 = ln 2, over ln 4
    halves = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    assert float(renyi_entropy(halves, 2.0, 0.0)) == pytest.approx(0.5)
    assert float(tsallis_entropy(halves, 2.0, 0.0)) == pytest.approx(0.5 / 0.75)


@pytest.mark.parametrize("of", [renyi_entropy, tsallis_entropy])
def test_index_one_is_shannon_and_so_nearly_is_one_nearby(of) -> None:
    shannon = float(entropy(PROBS)) / math.log(6)
    assert float(of(PROBS, 1.0, 0.0)) == pytest.approx(shannon)
    assert float(of(PROBS, 1.02, 0.0)) == pytest.approx(shannon, abs=3e-3)


@pytest.mark.parametrize("of", [renyi_entropy, tsallis_entropy])
@pytest.mark.parametrize("q", [0.5, 1.0, 1.1])
def test_gradient_by_finite_differences(of, q: float) -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: of(z.softmax(-1), q, 1e-5), logits)
