"""BASE: even loads in training, argmax in evaluation, sigmoid weights."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routerlab.core.protocols import Router
from routerlab.core.routing import RoutingContext
from routerlab.moe.layer import MoE
from routerlab.routers.base import Base


def router_of_logits(num_experts: int) -> Base:
    """A router whose logits are its input."""
    router = Base(num_experts, num_experts).double()
    router.gate.weight.data = torch.eye(num_experts, dtype=torch.float64)
    return router


def test_by_hand() -> None:
    # everyone likes expert 0; tokens 0 and 1 lose most without it: 2 + 1.5 + 0 + 0 is the best
    logits = torch.tensor([[2, 0], [1.5, 0], [1, 0], [0.5, 0]], dtype=torch.float64)
    output = router_of_logits(2)(logits)
    assert output.expert_indices.tolist() == [0, 0, 1, 1]
    expected = torch.tensor([0.880797, 0.817574, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(output.combine_weights, expected, rtol=0, atol=1e-6)
    evaluated = router_of_logits(2).eval()(logits)
    assert evaluated.expert_indices.tolist() == [0, 0, 0, 0]
    assert torch.equal(evaluated.combine_weights, logits[:, 0].sigmoid())


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(256, 8), (640, 64), (7, 7)])
def test_training_loads_are_exactly_even(num_tokens: int, num_experts: int) -> None:
    router = Base(16, num_experts, init_gain=3.0)
    output = router(torch.randn(num_tokens, 16) + 1)
    assert output.tokens_per_expert.unique().tolist() == [num_tokens // num_experts]
    assert output.token_indices.tolist() == list(range(num_tokens))
    assert (router.causal, router.causal_training, router.top_k) == (True, False, 1)
    assert isinstance(router, Router)


def test_loads_differ_by_one_where_experts_do_not_divide_tokens() -> None:
    output = Base(16, 8)(torch.randn(100, 16) + 1)
    assert output.tokens_per_expert.sort().values.tolist() == [12] * 4 + [13] * 4


def test_centroids_start_orthogonal_with_gain() -> None:
    weight = Base(32, 8).gate.weight
    torch.testing.assert_close(weight @ weight.T, 0.01 * torch.eye(8), rtol=0, atol=1e-6)
    weight = Base(32, 8, init_gain=2.0).gate.weight
    torch.testing.assert_close(weight @ weight.T, 4 * torch.eye(8), rtol=0, atol=1e-5)


def test_zero_output_projections_make_the_layer_the_identity() -> None:
    # the paper's y = a N(x) + (1 - a) x with N(x) = x + f(x), f = 0 at the start
    layer, x = MoE(8, 16, 4, router=Base(8, 4)), torch.randn(2, 6, 8)
    torch.nn.init.zeros_(layer.experts.down_proj)
    y, output = layer(x)
    assert torch.equal(x + y, x)
    assert output.tokens_per_expert.tolist() == [3, 3, 3, 3]


def test_the_residual_around_the_layer_is_the_papers_output() -> None:
    layer, x = MoE(8, 16, 4, router=Base(8, 4)).double(), torch.randn(12, 8, dtype=torch.float64)
    y, output = layer(x)
    experts = output.expert_indices.tolist()
    a = (x * layer.router.gate.weight[experts]).sum(1, keepdim=True).sigmoid()
    one = torch.ones(1, dtype=torch.float64)
    f = torch.cat([layer.experts.expert(e, x[[t]], one) for t, e in enumerate(experts)])
    torch.testing.assert_close(x + y, a * (x + f) + (1 - a) * x)


def test_the_gradient_flows_through_the_weight() -> None:
    logits = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    output = router_of_logits(4)(logits)
    output.combine_weights.sum().backward()
    expected = torch.zeros(8, 4, dtype=torch.float64)
    s = output.combine_weights.detach()
    expected[torch.arange(8), output.expert_indices] = s * (1 - s)
    torch.testing.assert_close(logits.grad, expected)


def test_padding_is_not_assigned() -> None:
    valid = torch.tensor([True, False, True] * 8)
    x = torch.randn(24, 8)
    x[~valid] *= 100
    router = Base(8, 4, init_gain=1.0)
    output, alone = router(x, RoutingContext(2, 12, valid=valid)), router(x[valid])
    assert torch.equal(output.expert_indices, alone.expert_indices)
    assert torch.equal(output.combine_weights, alone.combine_weights)
    assert output.tokens_per_expert.tolist() == [4, 4, 4, 4]
    assert output.valid is valid
    nothing = router(x, RoutingContext(2, 12, valid=torch.zeros_like(valid)))
    assert len(nothing.token_indices) == 0


def test_permuting_tokens_permutes_the_record() -> None:
    logits, order = torch.randn(20, 4, dtype=torch.float64), torch.randperm(20)
    router = router_of_logits(4)
    assert torch.equal(router(logits[order]).expert_indices, router(logits).expert_indices[order])


@settings(deadline=None, max_examples=40)
@given(
    scale=st.sampled_from([0.0, 1e-30, 1.0, 30.0, 1e4, 1e6]),
    training=st.booleans(),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_finite_for_finite_input(
    scale: float, training: bool, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    router = Base(8, 4, init_gain=1.0).to(dtype).train(training)
    x = (torch.randn(6, 8, generator=generator) * scale).to(dtype).requires_grad_()
    output = router(x)
    for tensor in (output.router_logits, output.router_probs, output.combine_weights):
        assert tensor.dtype == torch.promote_types(dtype, torch.float32)
        assert tensor.isfinite().all()
    torch.testing.assert_close(output.router_probs.sum(-1).double(), torch.ones(6).double())
    output.combine_weights.square().sum().backward()
    assert x.grad.isfinite().all()


def test_float32_under_autocast_and_no_state() -> None:
    router, x = Base(64, 4), torch.randn(9, 64)
    before = router.gate.weight.clone()
    random = torch.get_rng_state()
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = router(x)
    assert torch.equal(output.router_logits, plain.router_logits)
    assert torch.equal(output.combine_weights, plain.combine_weights)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(router.gate.weight, before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"top_k": 2}, ["top_k=2", "1"]), ({"init_gain": -1.0}, ["init_gain=-1.0", "at least 0"])],
)
def test_mistakes_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Base(8, 4, **changes)
    for word in words:
        assert word in str(error.value)
