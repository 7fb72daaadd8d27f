"""Routing by task: one expert a sequence."""

from functools import partial

import pytest
import torch

from routerlab.core.protocols import Router
from routerlab.core.routing import RoutingContext
from routerlab.experts.swiglu import SwiGLU
from routerlab.moe.layer import MoE
from routerlab.routers.build import build_router
from routerlab.routers.by_task import ByTask
from tests.routers.laws import dense_weights


def told(tasks: list[int], length: int = 3, valid: torch.Tensor | None = None) -> RoutingContext:
    return RoutingContext(len(tasks), length, valid=valid, task_ids=torch.tensor(tasks))


def test_the_record() -> None:
    router = build_router("by_task", d_model=4, num_experts=5)
    assert isinstance(router, Router)
    assert not router.state_dict()
    output = router(torch.randn(9, 4), told([2, 0, 2]))
    assert output.top_k == router.top_k == 1
    assert output.expert_indices.tolist() == [2] * 3 + [0] * 3 + [2] * 3
    assert output.combine_weights.tolist() == [1.0] * 9
    torch.testing.assert_close(output.router_probs, dense_weights(output))
    assert not output.router_logits.any()
    assert output.combine_weights.dtype == torch.float32


def test_padding_is_nothing() -> None:
    valid = torch.tensor([False, True, True, False, False, True])
    output = ByTask(4, 3)(torch.randn(6, 4), told([1, 2], valid=valid))
    assert output.token_indices.tolist() == [1, 2, 5]
    assert output.expert_indices.tolist() == [1, 1, 2]


def test_a_layer_is_the_expert_of_the_task_and_others_learn_nothing() -> None:
    layer = MoE(4, 6, 3, partial(ByTask)).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y, _ = layer(x, told([1, 1]))
    assert isinstance(layer.experts, SwiGLU)
    alone = layer.experts.expert(1, x.view(6, 4), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(y.view(6, 4), alone)
    y.square().sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).tolist() == [False, True, False]


def test_mistakes_are_named() -> None:
    router, x = ByTask(4, 3), torch.randn(6, 4)
    for context in (None, RoutingContext(2, 3)):
        with pytest.raises(ValueError, match=r"reads context.task_ids.*data that has tasks"):
            router(x, context)
    with pytest.raises(ValueError, match=r"num_experts=3: must be at least 6.*task_ids holds 5"):
        router(x, told([0, 5]))
    with pytest.raises(ValueError, match=r"context.task_ids=-1: must be at least 0"):
        router(x, told([0, -1]))
    with pytest.raises(ValueError, match="num_experts=0: must be at least 1"):
        ByTask(4, 0)
