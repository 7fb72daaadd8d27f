"""Capped expert choice: the solver against a plain loop, the rounding against its constraints."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routerlab.ops.capped_choice import capped_choice, capped_plan

# S [n, E] by hand: token 0 is the best of expert 1 and of expert 2, token 2 is nobody's best
SCORES = [[0.34, 0.33, 0.33], [0.6, 0.25, 0.15], [0.5, 0.2, 0.3]]


def scores_of(num_experts: int, num_tokens: int, groups: int = 1, seed: int = 0) -> Tensor:
    """Softmax of N(0, 4) logits, [G, E, n]."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(groups, num_tokens, num_experts, generator=generator).double()
    return logits.softmax(-1).transpose(1, 2).contiguous()


def dykstra(scores: Tensor, slots: int, cap: int, temperature: float, sweeps: int) -> Tensor:
    """The three projections with a correction each, in probabilities: one group, [E, n]."""
    a = (scores / temperature).exp()
    corrections = [torch.ones_like(a) for _ in range(3)]
    for _ in range(sweeps):
        for s in range(3):
            y = a * corrections[s]
            if s == 0:
                a = y * slots / y.sum(1, keepdim=True)
            elif s == 1:
                a = y * (cap / y.sum(0, keepdim=True)).clamp(max=1)
            else:
                a = y.clamp(max=1)
            corrections[s] = y / a
    return a


@pytest.mark.parametrize(("slots", "cap", "sweeps"), [(4, 2, 7), (4, 1, 50), (5, 3, 200)])
def test_the_plan_is_that_of_the_plain_loop(slots: int, cap: int, sweeps: int) -> None:
    scores = scores_of(4, 16) if slots == 4 else scores_of(5, 9)
    expected = dykstra(scores[0], slots, cap, 0.1, sweeps)
    plan = capped_plan(scores, slots, cap, 0.1, sweeps)[0].clamp(max=0).exp()
    # the tie-break changes A by at most a hundredth, before projections
    torch.testing.assert_close(plan, expected, rtol=0.03, atol=1e-6)


def test_a_converged_plan_keeps_its_constraints() -> None:
    plan = capped_plan(scores_of(4, 16), 6, 2, 0.1, 2000)[0].clamp(max=0).exp()
    torch.testing.assert_close(plan.sum(1), torch.full((4,), 6.0).double(), rtol=1e-3, atol=0)
    assert plan.sum(0).max() <= 2 + 1e-3
    assert plan.sum(0).max() > 2 - 1e-3  # it binds


def test_the_plan_maximises_the_objective() -> None:
    # moving mass around a rectangle of inner entries keeps all sums: no such move may gain
    scores, temperature = scores_of(3, 6), 0.5
    plan = capped_plan(scores, 2, 1, temperature, 2000)[0].clamp(max=0).exp()

    def objective(a: Tensor) -> Tensor:
        return (scores[0] * a).sum() - temperature * (a * a.log()).sum()

    moves = 0
    for i, j in [(0, 1), (1, 2), (0, 2)]:
        for s, t in [(0, 1), (2, 3), (4, 5), (1, 4)]:
            for step in (2e-2, -2e-2):
                moved = plan.clone()
                moved[i, s] += step
                moved[i, t] -= step
                moved[j, s] -= step
                moved[j, t] += step
                if moved.min() > 0 and moved.max() < 1:
                    assert objective(moved) < objective(plan)
                    moves += 1
    assert moves >= 6


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.1])
def test_three_tokens_by_hand(temperature: float, repair: bool) -> None:
    scores = torch.tensor(SCORES).T[None]
    assert scores.argmax(-1).tolist() == [[1, 0, 0]]  # uncapped: token 0 twice, token 2 never
    chosen = capped_choice(scores, 1, 1, temperature, 100, repair)
    assert chosen.int().argmax(-1).tolist() == [[1, 0, 2]]
    assert chosen.sum() == 3


@pytest.mark.parametrize("cap", [16, 20])
def test_a_cap_of_all_experts_is_no_cap(cap: int) -> None:
    scores = scores_of(16, 256, groups=2)
    plain = torch.zeros_like(scores, dtype=torch.bool)
    plain.scatter_(-1, scores.topk(32, dim=-1).indices, True)
    assert torch.equal(capped_choice(scores, 32, cap, 1e-4), plain)


@pytest.mark.parametrize(
    ("slots", "cap"),
    [
        (3, 1),  # 4 experts x 3 > 1 x 8 tokens
        (9, 4),  # 9 of 8 tokens
    ],
)
def test_an_impossible_cap_is_refused(slots: int, cap: int) -> None:
    with pytest.raises(ValueError, match=rf"slots={slots}.*4 experts.*8 tokens.*cap={cap}"):
        capped_choice(scores_of(4, 8), slots, cap)


def test_without_repair_the_papers_temperature_breaks_the_cap() -> None:
    scores = scores_of(16, 256).float()  # c = 2, b = 2
    plan = capped_plan(scores, 32, 2)[0].clamp(max=0).exp()
    assert plan.sum(1).max() < 10  # far from the 32 of a converged plan
    loose = capped_choice(scores, 32, 2, repair=False).sum(1)
    assert 50 < (loose > 2).sum() < 90  # tokens over the cap
    repaired = capped_choice(scores, 32, 2)
    assert (repaired.sum(1) == 2).all()
    assert (repaired.sum(2) == 32).all()
    worth = (scores * repaired).sum() / (scores * scores_chosen_at_random(scores, 32)).sum()
    assert worth > 2  # and not any choice that fits


def scores_chosen_at_random(scores: Tensor, slots: int) -> Tensor:
    """The first tokens of a random order."""
    order = torch.rand_like(scores).argsort(-1)[..., :slots]
    return torch.zeros_like(scores).scatter_(-1, order, 1.0)


@settings(deadline=None, max_examples=60)
@given(
    num_experts=st.integers(1, 7),
    num_tokens=st.integers(1, 12),
    groups=st.integers(1, 2),
    cap=st.integers(1, 7),
    kind=st.sampled_from(["random", "equal", "one_expert", "zeros"]),
    seed=st.integers(0, 1000),
)
def test_repaired_choices_keep_the_cap_and_fill_every_expert(
    num_experts: int, num_tokens: int, groups: int, cap: int, kind: str, seed: int
) -> None:
    slots = min(cap * num_tokens // num_experts, num_tokens)  # as tight as can be
    scores = scores_of(num_experts, num_tokens, groups, seed).float()
    if kind == "equal":
        scores = torch.full_like(scores, 1 / num_experts)
    elif kind == "one_expert":
        scores = torch.zeros_like(scores)
        scores[:, 0] = 1.0
    elif kind == "zeros":
        scores = torch.zeros_like(scores)
    chosen = capped_choice(scores, slots, cap, iterations=5)
    assert (chosen.sum(2) == slots).all()
    assert chosen.sum(1).max() <= cap


def test_groups_do_not_meet() -> None:
    scores = scores_of(4, 16, groups=3)
    together = capped_choice(scores, 8, 2)
    alone = [capped_choice(scores[g : g + 1], 8, 2) for g in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_equal_scores_cover_all_tokens() -> None:
    chosen = capped_choice(torch.full((1, 16, 256), 1 / 16), 32, 2, repair=False)
    assert (chosen.sum(1) == 2).all()
    assert (chosen.sum(2) == 32).all()


@pytest.mark.parametrize("temperature", [1e-6, 0.001, 10.0])
def test_plans_are_finite(temperature: float) -> None:
    # exp(S / 0.001) would overflow float32 above S = 0.0887
    assert math.exp(88.7) > torch.finfo(torch.float32).max / 2
    plan = capped_plan(scores_of(4, 16).float(), 8, 2, temperature)
    assert plan.isfinite().all()


def test_the_plan_has_no_gradient() -> None:
    assert not capped_plan(scores_of(4, 16).requires_grad_(), 8, 2).requires_grad
