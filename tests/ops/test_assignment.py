"""Balanced assignment: equal to all tries where they are few, proved optimal where they are not."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routerlab.ops.assignment import balanced_assignment


def loads(assignment: Tensor, num_experts: int) -> list[int]:
    return torch.bincount(assignment, minlength=num_experts).tolist()


def total(scores: Tensor, assignment: Tensor) -> float:
    return scores.double().gather(1, assignment[:, None]).sum().item()


def best_of_all(scores: Tensor) -> float:
    num_tokens, num_experts = scores.shape
    low, high = num_tokens // num_experts, -(-num_tokens // num_experts)
    tries = (torch.tensor(picks) for picks in product(range(num_experts), repeat=num_tokens))
    return max(
        total(scores, picks)
        for picks in tries
        if all(low <= load <= high for load in loads(picks, num_experts))
    )


@settings(deadline=None, max_examples=60)
@given(
    num_tokens=st.integers(1, 6),
    num_experts=st.integers(1, 4),
    kind=st.sampled_from(["normal", "ties", "rank one", "outlier"]),
    seed=st.integers(0, 10**6),
)
def test_equals_the_best_of_all_assignments(
    num_tokens: int, num_experts: int, kind: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, num_experts)
    if kind == "ties":
        scores = torch.randint(0, 3, shape, generator=generator).double()
    else:
        scores = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "rank one":
        scores = scores[:, :1] * scores[:1]
    if kind == "outlier":
        scores[0, 0] = 1e6
    ours = balanced_assignment(scores)
    low, high = num_tokens // num_experts, -(-num_tokens // num_experts)
    assert set(loads(ours, num_experts)) <= {low, high}
    assert total(scores, ours) == pytest.approx(best_of_all(scores), abs=1e-8)


def worst_cycle(scores: Tensor, assignment: Tensor) -> float:
    """The least loss of a round trip of tokens between experts: negative if one would gain."""
    num_experts = scores.shape[1]
    own = scores.gather(1, assignment[:, None]) - scores
    cost = torch.full((num_experts, num_experts), torch.inf, dtype=scores.dtype)
    for expert in assignment.unique().tolist():
        cost[expert] = own[assignment == expert].amin(0)
    for through in range(num_experts):  # Floyd and Warshall
        cost = torch.minimum(cost, cost[:, [through]] + cost[[through]])
    return cost.diagonal().min().item()


@pytest.mark.parametrize("kind", ["normal", "low rank", "duplicates", "constant", "one expert"])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(2048, 8), (1024, 64)])
def test_no_exchange_gains_anything(kind: str, num_tokens: int, num_experts: int) -> None:
    scores = torch.randn(num_tokens, num_experts, dtype=torch.float64)
    if kind == "low rank":
        scores = scores[:, :3] @ scores[:3] + 5 * scores[0]
    elif kind == "duplicates":
        scores = scores[torch.randint(0, 20, (num_tokens,))]
    elif kind == "constant":
        scores = torch.ones_like(scores)
    elif kind == "one expert":
        scores[:, 0] += 100
    ours = balanced_assignment(scores)
    assert loads(ours, num_experts) == [num_tokens // num_experts] * num_experts
    assert worst_cycle(scores, ours) >= -1e-9
    swapped = ours.clone()
    swapped[:2] = ours[[1, 0]]
    if kind == "normal" and ours[0] != ours[1]:  # and this proof can fail
        assert worst_cycle(scores, swapped) < -1e-3


def test_two_tokens_by_hand() -> None:
    # both like expert 0 best; .95 + .10 = 1.05 beats .05 + .90 = .95
    assert balanced_assignment(torch.tensor([[0.95, 0.05], [0.90, 0.10]])).tolist() == [0, 1]


def test_the_extra_tokens_go_where_they_gain_most() -> None:
    # T = 4, E = 3: one expert takes two. Tokens 0, 1 gain 10 at expert 1; the rest 1 at 0 and 2.
    scores = torch.tensor([[0.0, 10, 0], [0, 10, 0], [1, 0, 0], [0, 0, 1]])
    assert balanced_assignment(scores).tolist() == [1, 1, 0, 2]


def test_fewer_tokens_than_experts() -> None:
    scores = torch.tensor([[3.0, 2, 0, 0], [3, 0, 1, 0]])  # 2 + 3 beats 3 + 1
    assert balanced_assignment(scores).tolist() == [1, 0]


def test_non_finite_scores_are_the_last_choice() -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[nan, 1.0], [5.0, -inf], [inf, 2.0], [0.0, 1.0]])
    finite = torch.tensor([[0.0, 1.0], [5.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    ours = balanced_assignment(scores)
    assert total(finite, ours) == best_of_all(finite)
    assert loads(balanced_assignment(torch.full((4, 2), nan)), 2) == [2, 2]


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_scale_and_shift_change_nothing(scale: float) -> None:
    scores = torch.randn(60, 4, dtype=torch.float64)
    assert torch.equal(balanced_assignment(scores * scale), balanced_assignment(scores))
    shifted = scores + torch.randn(60, 1, dtype=torch.float64)
    assert torch.equal(balanced_assignment(shifted), balanced_assignment(scores))


def test_no_tokens() -> None:
    assert balanced_assignment(torch.zeros(0, 3)).shape == (0,)
