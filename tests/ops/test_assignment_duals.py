"""Prices of the balanced assignment: the paper's small cases, the dual, the loads that come out."""

import itertools

import pytest
import torch
from torch import Tensor

from routerlab.ops.assignment_duals import dual_objective, online_prices, solve_prices

TWO = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]], dtype=torch.float64)
THREE = torch.tensor(
    [[0.60, 0.25, 0.15], [0.55, 0.30, 0.15], [0.50, 0.20, 0.30],
     [0.45, 0.35, 0.20], [0.40, 0.22, 0.38], [0.38, 0.33, 0.29]],
    dtype=torch.float64,
)  # fmt: skip


def solve(scores: Tensor, top_k: int = 1, iterations: int = 1, **knobs: bool) -> Tensor:
    start = torch.zeros(scores.shape[1], dtype=scores.dtype)
    return solve_prices(scores, start, top_k, iterations, **knobs)


def loads(scores: Tensor, prices: Tensor, top_k: int = 1) -> list[int]:
    picks = (scores - prices).topk(top_k, dim=1).indices
    return torch.bincount(picks.flatten(), minlength=scores.shape[1]).tolist()


def token_prices(scores: Tensor, prices: Tensor, top_k: int = 1) -> Tensor:
    return (scores - prices).topk(top_k + 1, dim=1).values[:, -1].clamp(min=0)


def test_two_experts_by_hand() -> None:
    # p = [.1 .2 .3 .4]; s_0 - p = [.8 .6 .4 .2], its third largest is .4
    for iterations in (1, 2):
        prices = solve(TWO, iterations=iterations)
        torch.testing.assert_close(prices, torch.tensor([0.4, 0.0]).double())
    # token 2 ties (.7 - .4 = .3); half-way between .6 and .4 it does not
    halfway = solve(TWO, midpoint=True)
    torch.testing.assert_close(halfway, torch.tensor([0.5, 0.0]).double())
    assert loads(TWO, halfway) == [2, 2]


def test_dual_equals_the_best_balanced_assignment() -> None:
    # .9 + .8 + .3 + .4 = 2.4; greedy, unbalanced: 3.0
    best = max(
        sum(TWO[t, e].item() for t, e in enumerate(picks))
        for picks in itertools.product((0, 1), repeat=4)
        if sum(picks) == 2
    )
    assert best == pytest.approx(2.4)
    prices = solve(TWO)
    for iteration_prices in (torch.tensor([0.1, 0.2, 0.3, 0.4]), token_prices(TWO, prices)):
        value = dual_objective(TWO, iteration_prices.double(), prices, 1)
        assert value.item() == pytest.approx(best)


def test_three_experts_by_hand() -> None:
    prices = solve(THREE)
    torch.testing.assert_close(prices, torch.tensor([0.20, 0.0, 0.0]).double())
    halfway = solve(THREE, midpoint=True)
    torch.testing.assert_close(halfway, torch.tensor([0.225, 0.0, 0.0]).double())
    assert (THREE - halfway).argmax(1).tolist() == [0, 0, 2, 1, 2, 1]
    assert loads(THREE, torch.zeros(3).double()) == [6, 0, 0]


def simulated(num_experts: int, seed: int = 0, num_tokens: int = 4096) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn(num_experts, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    return (noise + offsets).softmax(-1)


def test_the_dual_never_rises_and_the_violation_falls() -> None:
    scores, top_k = simulated(16), 4
    duals, violations = [], []
    for iterations in (1, 2, 4, 8):
        prices = solve(scores, top_k, iterations)
        duals.append(dual_objective(scores, token_prices(scores, prices, top_k), prices, top_k))
        counts = torch.tensor(loads(scores, prices, top_k)).double()
        violations.append((counts.max() / counts.mean() - 1).item())
    assert duals == sorted(duals, reverse=True)
    assert violations == sorted(violations, reverse=True)
    # one draw of the distribution: 2.3 unsolved, .9 .5 .2 .05 after 1 2 4 8 pairs of updates
    assert violations[0] < 1.5
    assert violations[-1] < 0.12
    assert max(loads(scores, torch.zeros(16).double(), top_k)) > 2 * 1024


def test_without_clipping_starved_experts_are_lifted() -> None:
    scores = simulated(16)
    least = [min(loads(scores, solve(scores, 4, 2, clip=clip), 4)) for clip in (True, False)]
    assert least[1] > 2 * least[0]


def test_shifted_logits_need_the_unclipped_form() -> None:
    scores = simulated(8).log() - 5
    assert not solve(scores, 2, 8).any()
    free = solve(scores, 2, 30, clip=False)
    assert max(loads(scores, free, 2)) < 1.1 * 1024


def test_uniform_scores_and_all_experts_have_no_price() -> None:
    assert not solve(torch.full((8, 4), 0.25).double(), 2, 3).any()
    assert not solve(simulated(4), 4, 3).any()
    assert not solve(torch.zeros(0, 4).double(), 2, 3).any()


def test_a_token_s_constant_changes_nothing_at_the_fixed_point_and_scale_scales() -> None:
    scores = simulated(8, num_tokens=64)
    prices = solve(scores, 2, 100)
    raised = scores.clone()
    raised[3] += 0.7
    torch.testing.assert_close(solve(raised, 2, 100), prices, atol=1e-6, rtol=0)
    torch.testing.assert_close(solve(3 * scores, 2, 5), 3 * solve(scores, 2, 5))


def test_subsample_is_close_and_cheaper_to_reach() -> None:
    scores = simulated(16)
    start = torch.zeros(16, dtype=torch.float64)
    few = solve_prices(scores, start, 4, 8, subsample=1024)
    counts = loads(scores, few, 4)
    assert max(counts) < 1.25 * 1024
    assert torch.equal(solve_prices(scores, start, 4, 8, subsample=5000), solve(scores, 4, 8))


def test_online_looks_at_no_later_token() -> None:
    scores = simulated(8, num_tokens=60)
    start = torch.zeros(8, dtype=torch.float64)
    before = online_prices(scores, start, 2)
    moved = scores.clone()
    moved[40:] = moved[40:].roll(3, 1)
    assert torch.equal(online_prices(moved, start, 2)[:40], before[:40])
    assert not torch.equal(online_prices(moved, start, 2), before)


def test_online_balances_over_a_stream() -> None:
    scores = simulated(8, num_tokens=2000)
    prices = online_prices(scores, torch.zeros(8, dtype=torch.float64), 2)
    picks = (scores - prices).topk(2, dim=1).indices
    counts = torch.bincount(picks.flatten(), minlength=8)
    assert counts.max() < 1.3 * 500
    assert max(loads(scores, torch.zeros(8).double(), 2)) > 1.8 * 500


def test_online_by_hand() -> None:
    # K=1, E=2. Token 1: p = .1, surplus [.8, 0]; place floor(1/2)+1 = 1: q = [.8, 0].
    # Token 2: s - q = [0, .2], p = second largest = 0, surplus [.8, .2]; place floor(2/2)+1 = 2:
    # second largest of {.8, .8} = .8, of {0, .2} = 0
    prices = online_prices(TWO[:2], torch.zeros(2).double(), 1)
    torch.testing.assert_close(prices, torch.tensor([[0.8, 0.0], [0.8, 0.0]]).double())
