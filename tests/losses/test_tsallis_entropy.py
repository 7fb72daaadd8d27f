"""DynMoLE's entropy loss against the numbers of its reference code."""

import math

import pytest
import torch

from routerlab.losses.router_entropy import RouterEntropyLoss
from routerlab.losses.tsallis_entropy import TsallisEntropyLoss, tsallis_entropy
from tests.helpers.records import EX_A_PROBS, ex_a, record
from tests.helpers.step import padded_against_cut, shares_against_whole, top_k_output

PEAKED = [0.7, 0.1, 0.08, 0.06, 0.04, 0.02]


def value(probs: list[float], **knobs: float) -> float:
    return float(tsallis_entropy(torch.tensor(probs, dtype=torch.float64), **knobs))


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ([1 / 6] * 6, 0.999664),
        ([1.0] + [0.0] * 5, -0.000163),
        ([0.5, 0.2, 0.1, 0.1, 0.06, 0.04], 0.7926),
        (PEAKED, 0.579711),
        ([0.4, 0.25, 0.09, 0.09, 0.09, 0.08], 0.8715),
        ([0.3, 0.2, 0.15, 0.14, 0.11, 0.10], 0.95689),
    ],
)
def test_reference_values(probs: list[float], expected: float) -> None:
    digits = len(str(expected).split(".")[1])
    assert value(probs) == pytest.approx(expected, abs=0.51 * 10**-digits)


@pytest.mark.parametrize(("num_experts", "largest"), [(6, 1.640412), (8, 1.877476)])
def test_it_is_over_that_of_the_uniform_distribution(num_experts: int, largest: float) -> None:
    probs = torch.rand(num_experts, dtype=torch.float64).softmax(-1)
    raw = (1 - (probs + 1e-5).pow(1.1).sum()) / 0.1
    assert float(tsallis_entropy(probs)) == pytest.approx(float(raw) / largest, abs=1e-6)


def test_raw_values_of_the_running_example() -> None:
    mean = torch.tensor(EX_A_PROBS, dtype=torch.float64).mean(0).tolist()
    assert value(mean, entropic_index=2.0, eps=0.0) * 0.75 == pytest.approx(0.72875)
    first = EX_A_PROBS[0]
    assert value(first, entropic_index=2.0, eps=0.0) * 0.75 == pytest.approx(0.575)
    for q, raw in ((1.1, 0.984756), (0.5, 1.665431)):
        largest = (1 - 4 ** (1 - q)) / (q - 1)
        assert value(first, entropic_index=q, eps=0.0) * largest == pytest.approx(raw, abs=1e-6)


def test_the_loss_is_the_mean_over_tokens() -> None:
    output = record([PEAKED, [1 / 6] * 6], [[0, 1]] * 2)
    assert float(TsallisEntropyLoss()(output)) == pytest.approx(0.789687, abs=1e-6)


def test_index_one_is_shannon_and_so_nearly_is_one_nearby() -> None:
    shannon = float(RouterEntropyLoss()(ex_a()))
    exact = float(TsallisEntropyLoss(entropic_index=1.0, eps=0.0)(ex_a()))
    near = float(TsallisEntropyLoss(entropic_index=1.0001, eps=0.0)(ex_a()))
    assert exact == pytest.approx(shannon)
    assert near == pytest.approx(shannon, abs=1e-3)


def test_gradient_raises_the_top_logit_on_descent() -> None:
    logits = torch.tensor([PEAKED], dtype=torch.float64).log().requires_grad_()
    TsallisEntropyLoss(eps=0.0)(top_k_output(logits)).backward()
    expected = [-0.28215, 0.07411, 0.06869, 0.06038, 0.04830, 0.03066]
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize("q", [0.1, 0.5, 1.0, 1.1, 2.0])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_gradient_by_finite_differences(q: float, eps: float) -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: tsallis_entropy(z.softmax(-1), q, eps), logits)


@pytest.mark.parametrize("q", [0.1, 0.5, 1.0, 1.1, 2.0])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_finite_where_probabilities_are_zero(
    q: float, eps: float, dtype: torch.dtype
) -> None:
    # exact zeros, numbers too small for full precision, and a tie
    rows = [[1e4, -1e4, 0.0], [0.0, -90.0, -100.0], [0.0, 0.0, -1e4]]
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    value = TsallisEntropyLoss(entropic_index=q, eps=eps)(top_k_output(logits))
    value.backward()
    assert math.isfinite(value.item())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_invariant_to_relabelling_experts_and_to_a_constant() -> None:
    logits, loss = torch.randn(5, 6, dtype=torch.float64), TsallisEntropyLoss()
    expected = loss(top_k_output(logits))
    torch.testing.assert_close(loss(top_k_output(logits[:, torch.randperm(6)])), expected)
    torch.testing.assert_close(loss(top_k_output(logits + 3)), expected)


@pytest.mark.parametrize("q", [1.0, 1.1])
def test_shares_add_up_in_value_and_gradient(q: float) -> None:
    (value, grad), (whole, whole_grad) = shares_against_whole(TsallisEntropyLoss(entropic_index=q))
    assert whole_grad.abs().max() > 1e-3
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(grad, whole_grad)


def test_padding_changes_nothing() -> None:
    padded, cut = padded_against_cut(TsallisEntropyLoss())
    torch.testing.assert_close(padded, cut)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"entropic_index=0.0: must be above 0"):
        TsallisEntropyLoss(entropic_index=0.0)
    with pytest.raises(ValueError, match=r"eps=-1e-05: must be at least 0"):
        TsallisEntropyLoss(eps=-1e-5)
    with pytest.raises(ValueError, match=r"weight=inf: must be finite"):
        TsallisEntropyLoss(weight=math.inf)
    assert TsallisEntropyLoss(weight=-0.01).weight == -0.01
