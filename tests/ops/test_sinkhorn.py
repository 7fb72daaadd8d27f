"""Sinkhorn: plans by hand, a readable float64 reference, both numeric paths, and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routerlab.ops import sinkhorn
from routerlab.ops.sinkhorn import sinkhorn_bias

SIX = torch.tensor(
    [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.4, 0.4, 0.2]]
    + [[0.5, 0.2, 0.3]],
    dtype=torch.float64,
)


def plan(scores: Tensor, max_iter: int = 10_000, tol: float = 1e-12) -> Tensor:
    return (scores + sinkhorn_bias(scores, max_iter, tol)).softmax(-1)


def reference(scores: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """log u, log v by the log-domain formulas, columns first."""
    scores = scores.double()
    share = math.log(len(scores) / scores.shape[1])
    log_u = torch.zeros(len(scores), dtype=torch.float64)
    log_v = torch.zeros(scores.shape[1], dtype=torch.float64)
    for _ in range(iterations):
        log_v = share - (scores + log_u[:, None]).logsumexp(0)
        log_u = -(scores + log_v).logsumexp(1)
    return log_u, log_v


def column_error(pi: Tensor) -> float:
    return (pi.sum(0) - len(pi) / pi.shape[1]).norm().item()


def test_symmetric_example() -> None:
    # u and v are constant by symmetry: rows are softmax([.73, .27] / .5), sigma(.92) = .71504
    scores = torch.tensor([[0.73, 0.27], [0.27, 0.73]], dtype=torch.float64) / 0.5
    expected = torch.tensor([[0.71504, 0.28496], [0.28496, 0.71504]], dtype=torch.float64)
    torch.testing.assert_close(plan(scores), expected, rtol=0, atol=5e-6)


def test_the_plan_separates_two_tokens_that_both_prefer_expert_0() -> None:
    compatibility = torch.tensor([[0.95, 0.05], [0.90, 0.10]], dtype=torch.float64)
    pi = plan(compatibility / 0.5)
    expected = torch.tensor([[0.52498, 0.47502], [0.47502, 0.52498]], dtype=torch.float64)
    torch.testing.assert_close(pi, expected, rtol=0, atol=5e-6)
    assert compatibility.argmax(1).tolist() == [0, 0]
    assert pi.argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize(("xi", "loads"), [(1.0, [2, 3, 1]), (0.5, [2, 3, 1]), (0.05, [2, 2, 2])])
def test_even_columns_need_not_mean_even_picks(xi: float, loads: list[int]) -> None:
    assert torch.bincount(SIX.argmax(1), minlength=3).tolist() == [6, 0, 0]
    pi = plan(SIX / xi)
    two = torch.full((3,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(pi.sum(0), two, rtol=0, atol=1e-9)
    assert torch.bincount(pi.argmax(1), minlength=3).tolist() == loads


def test_the_cold_example_takes_45_iterations() -> None:
    scores = SIX / 0.05
    assert column_error(plan(scores, 44, 0.0)) >= 1e-6 > column_error(plan(scores, 45, 0.0))
    assert torch.equal(sinkhorn_bias(scores, 1000, 1e-6), sinkhorn_bias(scores, 45, 0.0))
    expected = torch.tensor([0.83728, 0.06513, 0.09760], dtype=torch.float64)
    torch.testing.assert_close(plan(scores)[0], expected, rtol=0, atol=6e-6)


@settings(deadline=None, max_examples=60)
@given(
    num_tokens=st.integers(1, 30),
    num_experts=st.integers(1, 8),
    iterations=st.integers(1, 30),
    scale=st.sampled_from([0.1, 1.0, 10.0, 60.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(
    num_tokens: int, num_experts: int, iterations: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64) * scale
    log_u, log_v = reference(scores, iterations)
    ours = sinkhorn_bias(scores, iterations, 0.0)
    torch.testing.assert_close(ours, log_v, rtol=1e-9, atol=1e-9)
    pi = (scores + log_v + log_u[:, None]).exp()
    torch.testing.assert_close((scores + ours).softmax(-1), pi, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pi.sum(1), torch.ones_like(pi[:, 0]), rtol=0, atol=1e-6)
    # weights from the plan are a softmax over the picks of C/xi + log v
    picks = pi.topk(min(2, num_experts)).indices
    alpha = pi.gather(1, picks) / pi.gather(1, picks).sum(1, keepdim=True)
    torch.testing.assert_close(
        (scores + ours).gather(1, picks).softmax(1), alpha, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stop", ["columns", "change"])
def test_both_paths_give_the_same_numbers(
    dtype: torch.dtype, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(200, 16, dtype=dtype) * 3  # range about 25: scaling vectors
    ours = [sinkhorn_bias(scores, 20, tol, stop) for tol in (0.0, 1e-3)]
    monkeypatch.setattr(sinkhorn, "SAFE_EXPONENT", -1.0)  # the plan itself, whatever the range
    other = [sinkhorn_bias(scores, 20, tol, stop) for tol in (0.0, 1e-3)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, other, rtol=tolerance, atol=tolerance)
    assert not torch.equal(ours[0], other[0])  # they did differ in how they computed


def test_columns_are_even_within_the_tolerance() -> None:
    scores = torch.randn(64, 8, dtype=torch.float64)
    for tol in (1e-2, 1e-4, 1e-8):
        assert column_error(plan(scores, 1000, tol)) < tol
    assert column_error(plan(scores, 2, 1e-8)) > 1e-2  # unless the iterations end before


def test_in_float32_rounding_error_stops_it() -> None:
    # at T = 4096 the norm of the column sums is 512, so 1e-12 is out of reach
    scores = torch.randn(4096, 64)
    stopped = sinkhorn_bias(scores, 30, 1e-12)
    assert not torch.equal(stopped, sinkhorn_bias(scores, 30, 0.0))
    assert column_error((scores + stopped).softmax(-1)) < 4e-3


def test_constants_cancel() -> None:
    scores = torch.randn(7, 3, dtype=torch.float64)
    pi = plan(scores)
    for change in (torch.randn(7, 1, dtype=torch.float64), torch.randn(3, dtype=torch.float64)):
        torch.testing.assert_close(plan(scores + change), pi, rtol=0, atol=1e-10)


def test_permuting_tokens_permutes_the_rows() -> None:
    scores = torch.randn(9, 4, dtype=torch.float64)
    order = torch.randperm(9)
    torch.testing.assert_close(plan(scores[order], 5), plan(scores, 5)[order])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 80.0, 1e4, 2e5, 1e30])
def test_finite_for_finite_scores(scale: float) -> None:
    scores = (torch.rand(50, 6) * 2 - 1) * scale
    scores[:, 0] = scale  # everyone's favourite
    scores[:, 1] = -scale
    bias = sinkhorn_bias(scores, 20, 1e-4)
    pi = (scores + bias).softmax(-1)
    assert bias.isfinite().all()
    assert pi.isfinite().all()
    torch.testing.assert_close(pi.sum(1), torch.ones(50))


def test_an_expert_that_underflows_catches_up() -> None:
    # exp(-300) is 0 in float32: three iterations of a factor of at most e^87, then the reference's
    scores = torch.randn(40, 3)
    scores[:, 2] -= 300
    pi = (scores + sinkhorn_bias(scores, 40, 0.0)).softmax(-1)
    assert column_error(pi) < 1e-3
    torch.testing.assert_close(pi.double(), plan(scores.double()), rtol=1e-3, atol=1e-5)


def test_no_tokens() -> None:
    assert sinkhorn_bias(torch.zeros(0, 3)).tolist() == [0, 0, 0]


def test_one_iteration_by_hand() -> None:
    # K = [[1, 2], [3, 4]]: v = (2/2) / [4, 6]
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64).log()
    expected = torch.tensor([1 / 4, 1 / 6], dtype=torch.float64).log()
    torch.testing.assert_close(sinkhorn_bias(scores, 1), expected)


def megatron(logits: Tensor, tol: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Megatron-LM's loop as published: (plan, d1)."""
    kernel = logits.exp()
    d1 = torch.ones(logits.shape[1], dtype=logits.dtype)
    error = math.inf
    while error > tol:
        before = d1
        d0 = (1 / len(logits)) / (kernel @ d1 + 1e-8)
        d1 = (1 / logits.shape[1]) / (kernel.T @ d0 + 1e-8)
        error = (before - d1).abs().mean().item()
    return d1 * kernel * d0[:, None], d1


def test_rows_first_until_the_change_is_small_is_megatron() -> None:
    logits = torch.tensor([[2, 0], [1.5, 0], [1, 0], [0.5, 0]], dtype=torch.float64)
    published, d1 = megatron(logits)
    bias = sinkhorn_bias(logits.log_softmax(-1), 100, 1e-4, stop="change")
    torch.testing.assert_close(bias.exp(), d1, rtol=1e-6, atol=0)
    pi = (logits + bias).softmax(-1) / 4  # Megatron's marginals: rows 1/T, columns 1/E, total 1
    torch.testing.assert_close(pi, published, rtol=1e-3, atol=0)
    torch.testing.assert_close(published.sum().item(), 1.0, rtol=0, atol=1e-6)
    torch.testing.assert_close(pi.sum(1), torch.full((4,), 0.25, dtype=torch.float64))
    half = torch.full((2,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(pi.sum(0), half, rtol=0, atol=1e-4)
    assert pi.argmax(1).tolist() == [0, 0, 1, 1]
    big = torch.randn(300, 8, dtype=torch.float64)
    bias = sinkhorn_bias(big.log_softmax(-1), 1000, 1e-4, stop="change")
    torch.testing.assert_close(bias.exp(), megatron(big)[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("safe", [30.0, -1.0])
def test_gradient_through_the_iterations(safe: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinkhorn, "SAFE_EXPONENT", safe)
    scores = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: sinkhorn_bias(s, 4, 0.0), scores)
