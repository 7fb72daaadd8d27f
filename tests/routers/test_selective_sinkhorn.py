"""Selective Sinkhorn routing: which steps use the plan, who agrees on it, and the noise."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.core.protocols import Router
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.selective_sinkhorn import SelectiveSinkhorn
from routerlab.routers.sinkhorn import Sinkhorn
from routerlab.routers.token_choice import TokenChoice

X = torch.randn(40, 16, generator=torch.Generator().manual_seed(7))


def build(kind: type, **changes: Any) -> Any:
    torch.manual_seed(1)
    return kind(16, 8, init_std=1.0, **changes)


def assert_equal(ours: RouterOutput, theirs: RouterOutput) -> None:
    for name in ("router_logits", "router_probs", "expert_indices", "combine_weights"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def plan_steps(router: SelectiveSinkhorn, contexts: list[RoutingContext]) -> list[bool]:
    """Where the record is not that of the softmax."""
    softmax = router.eval()(X).router_probs
    router.train()
    return [not torch.equal(router(X, context).router_probs, softmax) for context in contexts]


@pytest.mark.parametrize("top_k", [1, 2])
def test_p_0_is_the_softmax_router_bit_for_bit(top_k: int) -> None:
    router = build(SelectiveSinkhorn, top_k=top_k, p=0.0)
    softmax = build(TokenChoice, top_k=top_k, normalize_weights=top_k > 1)
    assert_equal(router(X), softmax(X))
    for r in (router, softmax):
        r(X).combine_weights.square().sum().backward()
    assert torch.equal(router.gate.weight.grad, softmax.gate.weight.grad)
    assert router.causal_training


def test_p_1_uses_the_plan_on_every_step() -> None:
    router = build(SelectiveSinkhorn, p=1.0, cost="softmax", xi=0.3)
    plan = build(Sinkhorn, cost="softmax", xi=0.3)(X)
    assert_equal(router(X), plan)  # needs no context: nothing is drawn
    torch.testing.assert_close(plan.router_probs.sum(0), torch.full((8,), 5.0), rtol=0, atol=1e-3)
    for step in range(20):
        assert_equal(router(X, RoutingContext(1, 40, step_seed=step)), plan)
    assert not router.causal_training


def test_evaluation_is_independent_of_p_xi_and_seed_bit_for_bit() -> None:
    softmax = build(TokenChoice).eval()(X)
    for p, xi, noise, seed in [(0.0, 0.05, 0.0, 0), (1.0, 1.0, 4.0, 1), (0.5, 0.5, 1.0, 2)]:
        changes = {"noise_branch": "both", "noise_std": noise}
        router = build(SelectiveSinkhorn, p=p, xi=xi, **changes).eval()
        assert_equal(router(X, RoutingContext(1, 40, seed=seed, step_seed=seed)), softmax)
        assert_equal(router(X), softmax)


# -- the coin -------------------------------------------------------------------------------------


def test_ranks_micro_batches_and_recomputation_agree() -> None:
    router = build(SelectiveSinkhorn, p=0.5)
    agreed = []
    for step in range(40):
        contexts = [RoutingContext(1, 40, seed=s, step_seed=step, layer=3) for s in (0, 1, 2, 0)]
        agreed.append(set(plan_steps(router, contexts)))
    assert all(len(decisions) == 1 for decisions in agreed)
    assert {True} in agreed
    assert {False} in agreed


def test_layers_throw_their_own_coin_or_share_one() -> None:
    for granularity, shared in (("layer", False), ("step", True)):
        router = build(SelectiveSinkhorn, p=0.5, granularity=granularity)
        same = []
        for step in range(20):
            contexts = [RoutingContext(1, 40, step_seed=step, layer=n) for n in range(4)]
            same.append(len(set(plan_steps(router, contexts))) == 1)
        assert all(same) is shared  # 20 steps of 4 fair coins: 8^-20 to agree by chance


@pytest.mark.parametrize(
    ("p", "draws"), [(0.3, 10_000), pytest.param(0.01, 100_000, marks=pytest.mark.slow)]
)
def test_frequency(p: float, draws: int) -> None:
    router = build(SelectiveSinkhorn, p=p)
    context = [RoutingContext(1, 40, step_seed=n // 2, layer=n % 2) for n in range(draws)]
    hits = sum(router._draws_plan(c) for c in context)
    assert abs(hits - p * draws) < 3 * math.sqrt(draws * p * (1 - p))


@pytest.mark.parametrize(
    "changes", [{"p": 0.5}, {"p": 0.0, "noise_branch": "softmax", "noise_std": 1.0}]
)
def test_draws_need_a_context(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="RoutingContext"):
        build(SelectiveSinkhorn, **changes)(X)


# -- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["softmax", "sinkhorn", "both", "none"])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_noise_goes_where_it_is_asked_for(branch: str, p: float) -> None:
    noise_std = 0.0 if branch == "none" else 0.5
    quiet = build(SelectiveSinkhorn, p=p)
    noisy = build(SelectiveSinkhorn, p=p, noise_branch=branch, noise_std=noise_std)
    context = RoutingContext(1, 40, seed=3)
    expected = branch == "both" or branch == ("softmax" if p == 0 else "sinkhorn")
    ours, plain = noisy(X, context), quiet(X, context)
    assert torch.equal(ours.router_probs, plain.router_probs) is not expected
    assert torch.equal(ours.router_logits, plain.router_logits)  # the record's logits are clean
    assert_equal(noisy(X, context), ours)  # as when recomputing
    other = noisy(X, RoutingContext(1, 40, seed=4))
    assert torch.equal(other.router_probs, ours.router_probs) is not expected


def test_noise_is_gaussian_of_the_given_size() -> None:
    router = SelectiveSinkhorn(4, 4, p=0.0, noise_branch="softmax", noise_std=2.0, init_std=0.0)
    noise = router(torch.ones(5000, 4), RoutingContext(1, 5000)).router_probs.log()
    difference: Tensor = noise[:, 0] - noise[:, 1]  # logits are 0: std 2 sqrt(2); error 1%
    assert difference.std().item() == pytest.approx(2 * math.sqrt(2), rel=0.04)
    assert abs(difference.mean().item()) < 0.2


def test_is_a_router() -> None:
    router = SelectiveSinkhorn(16, 8)
    assert isinstance(router, Router)
    assert (router.causal, router.causal_training, router.top_k) == (True, False, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"p": 1.5}, ["p=1.5", "at most 1"]),
        ({"granularity": "batch"}, ["granularity='batch'", "'layer'", "'step'"]),
        ({"noise_branch": "all"}, ["noise_branch='all'", "'softmax'", "'none'"]),
        ({"noise_std": -1.0}, ["noise_std=-1.0", "at least 0"]),
        ({"noise_std": 1.0}, ["noise_std=1.0", "noise_branch='none'"]),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        SelectiveSinkhorn(8, 4, **changes)
    for word in words:
        assert word in str(error.value)
