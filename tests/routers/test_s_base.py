"""S-BASE: Megatron's picks and weights."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routerlab.core.protocols import Router
from routerlab.core.routing import RoutingContext
from routerlab.routers.s_base import SBase

FOUR = torch.tensor([[2, 0], [1.5, 0], [1, 0], [0.5, 0]], dtype=torch.float64)


def router_of_logits(num_experts: int, **changes: Any) -> SBase:
    """A router whose logits are its input."""
    router = SBase(num_experts, num_experts, **changes).double()
    router.gate.weight.data = torch.eye(num_experts, dtype=torch.float64)
    return router


def megatron_picks(logits: Tensor, top_k: int, tol: float = 1e-4) -> Tensor:
    """Its published loop, without a cap."""
    kernel = logits.exp()
    d1 = torch.ones(logits.shape[1], dtype=logits.dtype)
    error = math.inf
    while error > tol:
        before = d1
        d0 = (1 / len(logits)) / (kernel @ d1 + 1e-8)
        d1 = (1 / logits.shape[1]) / (kernel.T @ d0 + 1e-8)
        error = (before - d1).abs().mean().item()
    return (d1 * kernel * d0[:, None]).topk(top_k, dim=1).indices


def test_one_pick_by_hand() -> None:
    # the plan sends the two tokens that want expert 0 least to expert 1; sigma(2) = .8808
    output = router_of_logits(2, top_k=1)(FOUR)
    assert output.expert_indices.tolist() == [0, 0, 1, 1]
    expected = torch.tensor([0.8808, 0.8176, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(output.combine_weights, expected, rtol=0, atol=5e-5)
    evaluated = router_of_logits(2, top_k=1).eval()(FOUR)
    assert evaluated.expert_indices.tolist() == [0, 0, 0, 0]
    assert torch.equal(evaluated.combine_weights, FOUR[:, 0].sigmoid())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_picks_are_megatrons_and_weights_the_plain_scores(top_k: int) -> None:
    logits = torch.randn(200, 6, dtype=torch.float64) + torch.arange(6)
    output = router_of_logits(6, top_k=top_k, max_iter=1000)(logits)
    picks = output.expert_indices.view(200, top_k)
    assert torch.equal(picks, megatron_picks(logits, top_k))
    scores = logits.sigmoid() if top_k == 1 else logits.softmax(-1)
    torch.testing.assert_close(output.combine_weights.view(200, top_k), scores.gather(1, picks))
    if top_k == 1:
        torch.testing.assert_close(output.router_probs, scores / scores.sum(1, keepdim=True))
        assert output.tokens_per_expert.max() < 60  # 33 is even
        assert logits.argmax(1).bincount(minlength=6).max() > 100
    else:
        assert torch.equal(output.router_probs, scores)


@pytest.mark.parametrize("top_k", [1, 2])
def test_evaluation_is_top_k_of_the_scores(top_k: int) -> None:
    logits = torch.randn(50, 6, dtype=torch.float64)
    output = router_of_logits(6, top_k=top_k).eval()(logits)
    assert torch.equal(output.expert_indices.view(50, top_k), logits.topk(top_k).indices)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_gradient_flows_through_the_weights_only(top_k: int) -> None:
    logits = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    output = router_of_logits(4, top_k=top_k)(logits)
    picks = output.expert_indices.view(9, top_k)
    scores = logits.sigmoid() if top_k == 1 else logits.softmax(-1)
    targets = torch.randn(9, top_k, dtype=torch.float64)
    (expected,) = torch.autograd.grad((scores.gather(1, picks) * targets).sum(), logits)
    ours = (output.combine_weights.view(9, top_k) * targets).sum()
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], expected)
    assert expected.norm() > 1e-2


def test_the_loop_is_capped() -> None:
    # at E = 2 and a gap of 12 Megatron's rule needs many rounds; two are two
    logits = FOUR * 6
    few, many = (router_of_logits(2, top_k=1, max_iter=n)(logits) for n in (1, 1000))
    assert few.tokens_per_expert.tolist() != many.tokens_per_expert.tolist() == [2, 2]


def test_padding_changes_no_real_token() -> None:
    valid = torch.tensor([True, False, True] * 6)
    x = torch.randn(18, 8)
    x[~valid] *= 100
    router = SBase(8, 4, init_std=1.0)
    output, alone = router(x, RoutingContext(2, 9, valid=valid)), router(x[valid])
    assert torch.equal(output.expert_indices, alone.expert_indices)
    assert torch.equal(output.combine_weights, alone.combine_weights)
    assert output.valid is valid
    assert len(router(x, RoutingContext(2, 9, valid=~(valid | ~valid))).token_indices) == 0


@settings(deadline=None, max_examples=40)
@given(
    top_k=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 30.0, 1e4, 1e6]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_finite_for_finite_input(top_k: int, scale: float, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    router = SBase(8, 4, top_k, init_std=1.0).to(dtype)
    x = (torch.randn(6, 8, generator=generator) * scale).to(dtype).requires_grad_()
    output = router(x)
    for tensor in (output.router_logits, output.router_probs, output.combine_weights):
        assert tensor.dtype == torch.promote_types(dtype, torch.float32)
        assert tensor.isfinite().all()
    torch.testing.assert_close(output.router_probs.sum(-1).double(), torch.ones(6).double())
    output.combine_weights.square().sum().backward()
    assert x.grad.isfinite().all()


def test_float32_under_autocast_and_no_state() -> None:
    router, x = SBase(64, 4, init_std=1.0), torch.randn(9, 64)
    before = router.gate.weight.clone()
    random = torch.get_rng_state()
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = router(x)
    assert torch.equal(output.router_logits, plain.router_logits)
    assert torch.equal(output.combine_weights, plain.combine_weights)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(router.gate.weight, before)


def test_is_a_router() -> None:
    router = SBase(16, 8)
    assert isinstance(router, Router)
    assert (router.causal, router.causal_training, router.top_k) == (True, False, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 0}, ["top_k=0", "at least 1"]),
        ({"max_iter": 0}, ["max_iter=0", "at least 1"]),
        ({"tol": -1.0}, ["tol=-1.0", "at least 0"]),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        SBase(8, 4, **changes)
    for word in words:
        assert word in str(error.value)
