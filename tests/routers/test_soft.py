"""Soft routing: all experts, softmax weights."""

import torch

from routerlab.core.protocols import Router
from routerlab.core.routing import RoutingContext
from routerlab.routers.soft import SoftRouter
from tests.routers.laws import assert_finite, assert_padding_is_nothing, assert_tokens_permute


def test_all_experts_with_softmax_weights() -> None:
    router, x = SoftRouter(8, 5, init_std=1.0), torch.randn(7, 8)
    assert isinstance(router, Router)
    assert router.causal
    output = router(x)
    assert output.top_k == router.top_k == 5
    assert output.dispatch_mask.all()
    weights = output.combine_weights.view(7, 5)
    torch.testing.assert_close(weights, (x @ router.gate.weight.T).softmax(-1))
    torch.testing.assert_close(weights, output.router_probs)
    assert output.expert_load.tolist() == [torch.tensor(0.2).item()] * 5


def test_gradient_reaches_gate_and_tokens() -> None:
    router, x = SoftRouter(8, 5), torch.randn(7, 8, requires_grad=True)
    router(x).combine_weights.square().sum().backward()
    assert router.gate.weight.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


def test_padding_leaves_the_record() -> None:
    valid = torch.tensor([True, False, True])
    output = SoftRouter(8, 2)(torch.randn(3, 8), RoutingContext(1, 3, valid=valid))
    assert output.token_indices.tolist() == [0, 0, 2, 2]
    assert output.top_k is None


def test_laws() -> None:
    assert_tokens_permute(SoftRouter(8, 6, init_std=0.5))
    assert_padding_is_nothing(SoftRouter(8, 6, init_std=0.5))
    assert_finite(SoftRouter(6, 6))
