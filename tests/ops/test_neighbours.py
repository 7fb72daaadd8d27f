"""Neighbours and their weights: worked numbers of RoMA, brute force, and what must not matter."""

import math

import pytest
import torch
from torch import Tensor

from routerlab.ops import neighbours
from routerlab.ops.neighbours import KERNELS, KINDS, Neighbourhood, NeighbourMeans

ALL = torch.tensor([True, True])


def line(*squared: float) -> Tensor:
    """Points at these squared distances from the origin."""
    return torch.tensor(squared, dtype=torch.float64).sqrt()[:, None]


def unit(count: int, width: int = 6, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    points = torch.randn(count, width, generator=draws, dtype=torch.float64)
    return points / points.norm(dim=1, keepdim=True)


# -- kernels --------------------------------------------------------------------------------------


def test_gaussian_weights_by_hand() -> None:
    rule = Neighbourhood(sigma=0.5)
    sims = rule.log_similarity(line(0.0), line(0.2, 0.8)).exp()
    torch.testing.assert_close(
        sims[0], torch.tensor([0.67032, 0.201897]).double(), atol=1e-6, rtol=0
    )
    weights = rule.weights(line(0.0), line(0.2, 0.8), ALL)
    expected = torch.tensor([0.768525, 0.231475]).double()
    torch.testing.assert_close(weights[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kernel", "expected"), [("gaussian", [0.924, 0.076]), ("cosine_sq", [0.679, 0.321])]
)
def test_the_paper_and_its_code_have_other_kernels(kernel: str, expected: list[float]) -> None:
    cosines = (0.9, 0.5)
    query = torch.tensor([[1.0, 0.0]]).double()
    references = torch.tensor([[c, math.sqrt(1 - c * c)] for c in cosines]).double()
    weights = Neighbourhood(kernel=kernel, sigma=0.4).weights(query, references, ALL)
    torch.testing.assert_close(weights[0], torch.tensor(expected).double(), atol=5e-4, rtol=0)


def test_far_neighbours_do_not_underflow() -> None:
    weights = Neighbourhood(sigma=0.001).weights(line(0.0).float(), line(1.0, 4.0).float(), ALL)
    assert weights.tolist() == [[1.0, 0.0]]


# -- who is a neighbour ---------------------------------------------------------------------------


def dense(rule: Neighbourhood, points: Tensor, candidates: Tensor, seed: int = 0) -> Tensor:
    return torch.cat(list(rule.blocks(points, candidates, torch.Generator().manual_seed(seed))))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_successful_others(kind: str, kernel: str) -> None:
    points, candidates = unit(40), torch.rand(40) < 0.5
    points[1] = points[0]  # equal prompts of two samples may be neighbours
    candidates[:2] = True
    weights = dense(Neighbourhood(kind, k=4, kernel=kernel), points, candidates)
    assert not weights[:, ~candidates].any()
    assert not weights.diagonal().any()
    sums = weights.sum(1)
    torch.testing.assert_close(sums[sums > 0], torch.ones_like(sums[sums > 0]))
    if kind != "ball":
        assert (weights > 0).sum(1).eq(4).all()
    if kind != "random":
        assert weights[0].argmax() == 1


def test_nearest_by_brute_force() -> None:
    points, candidates = unit(30), torch.rand(30) < 0.6
    rule = Neighbourhood(k=3, sigma=0.4)
    weights = dense(rule, points, candidates)
    for i in range(30):
        others = [j for j in range(30) if j != i and candidates[j]]
        distances = {j: float((points[i] - points[j]).square().sum()) for j in others}
        chosen = sorted(others, key=distances.__getitem__)[:3]
        assert sorted(weights[i].nonzero().flatten().tolist()) == sorted(chosen)
        sims = {j: math.exp(-distances[j] / (2 * 0.4**2)) for j in chosen}
        for j in chosen:
            assert float(weights[i, j]) == pytest.approx(sims[j] / sum(sims.values()))


def test_the_ball_is_a_matter_of_similarity() -> None:
    points = torch.cat([line(0.0), line(0.2, 0.8)])
    rule = Neighbourhood("ball", sigma=0.5, epsilon=0.5)  # similarities 0.67 and 0.20
    weights = dense(rule, points, torch.tensor([True, True, True]))
    assert weights[0].tolist() == [0.0, 1.0, 0.0]
    wide = dense(Neighbourhood("ball", sigma=0.5, epsilon=0.2), points, torch.ones(3).bool())
    torch.testing.assert_close(wide[0, 1:], torch.tensor([0.768525, 0.231475]).double(),
                               atol=1e-6, rtol=0)  # fmt: skip
    lonely = dense(Neighbourhood("ball", sigma=0.1, epsilon=0.9), points, torch.ones(3).bool())
    assert not lonely.any()


def test_fewer_candidates_than_k() -> None:
    points = unit(5)
    one = torch.tensor([False, False, True, False, False])
    weights = dense(Neighbourhood(k=3), points, one)
    assert weights[:, 2].tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert not dense(Neighbourhood(k=9), points, torch.zeros(5).bool()).any()


def test_random_neighbours_are_drawn_by_seed_with_equal_weights() -> None:
    points, candidates = unit(50), torch.ones(50).bool()
    rule = Neighbourhood("random", k=5)
    first, again, other = (dense(rule, points, candidates, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first[first > 0].eq(first.max()).all()
    torch.testing.assert_close(first.max(), torch.tensor(0.2).double())


# -- means ----------------------------------------------------------------------------------------


def card() -> tuple[NeighbourMeans, Tensor]:
    """Sample 0 with its two neighbours, E = 3 (a case worked by hand)."""
    routing = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]).double()
    points = torch.cat([line(0.0), line(0.2, 0.8)])
    candidates = torch.tensor([False, True, True])
    return Neighbourhood(sigma=0.5).means(points, candidates, routing), routing


def test_the_manifold_distance_by_hand() -> None:
    means, routing = card()
    expected = torch.tensor([0.40741, 0.415738, 0.176852]).double()
    torch.testing.assert_close(means.mean[0], expected, atol=1e-5, rtol=0)
    assert float(means.spread[0]) == pytest.approx(0.0747157, abs=1e-6)
    found = means.distances(routing[:1], torch.tensor([0]))
    assert float(found) == pytest.approx(0.2127736, abs=1e-6)
    assert float((routing[0] - means.mean[0]).square().sum()) == pytest.approx(0.138058, abs=1e-6)
    assert means.count.tolist() == [2, 1, 1]


def test_its_gradient_by_hand() -> None:
    means, routing = card()
    logits = routing[:1].log().requires_grad_()
    vectors = logits.softmax(-1)
    vectors.retain_grad()
    means.distances(vectors, torch.tensor([0])).sum().backward()
    by_r = torch.tensor([[0.58518, -0.431475, -0.153705]]).double()
    by_z = torch.tensor([[0.194054, -0.147887, -0.046167]]).double()
    torch.testing.assert_close(vectors.grad, by_r, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits.grad, by_z, atol=2e-5, rtol=0)
    assert abs(float(logits.grad.sum())) < 1e-12
    assert torch.autograd.gradcheck(
        lambda z: means.distances(z.softmax(-1), torch.tensor([0])), (logits,)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_means_are_those_of_all_pairs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points, candidates = unit(30), torch.rand(30) < 0.5
    values = torch.rand(30, 8, dtype=torch.float64)
    monkeypatch.setattr(neighbours, "BLOCK", 30)
    rule = Neighbourhood(kind, sigma=0.6)
    weights = dense(rule, points, candidates)
    means = rule.means(points, candidates, values, torch.Generator().manual_seed(0))
    pairs = (values[:, None] - values).square().sum(-1)
    torch.testing.assert_close(means.distances(values, torch.arange(30)), (weights * pairs).sum(1))
    assert torch.equal(means.count, (weights > 0).sum(1))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points, candidates = unit(30), torch.rand(30) < 0.5
    whole = dense(Neighbourhood(), points, candidates)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    torch.testing.assert_close(dense(Neighbourhood(), points, candidates), whole)


def test_distances_are_zero_only_among_equals_and_know_no_expert_names() -> None:
    points, candidates = unit(12), torch.ones(12).bool()
    same = torch.full((12, 4), 0.25, dtype=torch.float64)
    numbers = torch.arange(12)
    none = Neighbourhood().means(points, candidates, same).distances(same, numbers)
    assert none.max() < 1e-12
    values = torch.randn(12, 4, dtype=torch.float64).softmax(-1)
    found = Neighbourhood().means(points, candidates, values).distances(values, numbers)
    assert found.min() > 1e-3
    order = torch.randperm(4)
    moved = Neighbourhood().means(points, candidates, values[:, order])
    torch.testing.assert_close(moved.distances(values[:, order], numbers), found)


def test_samples_without_neighbours_or_number_count_nothing() -> None:
    points = torch.cat([line(0.0), line(0.1, 9.0)])
    values = torch.rand(3, 2, dtype=torch.float64)
    means = Neighbourhood("ball", sigma=0.5).means(points, torch.ones(3).bool(), values)
    vectors = values.clone().requires_grad_()
    found = means.distances(vectors[[0, 1, 2, 0]], torch.tensor([0, 1, 2, -1]))
    assert found[0] > 0
    assert found[2:].tolist() == [0.0, 0.0]
    found.sum().backward()
    assert vectors.grad[2].eq(0).all()


def test_mistakes_are_named() -> None:
    for knobs, message in [
        ({"kind": "near"}, "neighbours='near': must be one of 'knn', 'ball', 'random'"),
        ({"kernel": "rbf"}, "kernel='rbf': must be one of"),
        ({"k": 0}, "k=0: must be at least 1"),
        ({"epsilon": 0.0}, "epsilon=0.0: must be above 0 and at most 1"),
        ({"sigma": -1}, "sigma=-1: must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Neighbourhood(**knobs)
