"""LoRA-Mixer's routing: dense in training, sparse in evaluation, absent experts."""

from typing import Any

import pytest
import torch

from routerlab.core.protocols import Router
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.build import build_router
from routerlab.routers.soft import SoftRouter
from routerlab.routers.soft_then_top_k import SoftThenTopK
from tests.routers.laws import (
    assert_finite,
    assert_padding_is_nothing,
    assert_tokens_permute,
    dense_weights,
    of_logits,
)

PROBS = [0.40, 0.25, 0.15, 0.10, 0.06, 0.04]


def route(training: bool, absent: tuple[int, ...] = (), **changes: Any) -> RouterOutput:
    router = of_logits(SoftThenTopK(6, 6, **changes)).train(training)
    router.exclude(list(absent))
    return router(torch.tensor([PROBS], dtype=torch.float64).log())


@pytest.mark.parametrize(
    ("training", "changes", "expected"),
    [
        (True, {}, PROBS),
        (False, {}, [0.5, 0.3125, 0.1875, 0, 0, 0]),
        (False, {"normalize_weights": False}, [0.4, 0.25, 0.15, 0, 0, 0]),
        (False, {"eval_top_k": 1}, [1, 0, 0, 0, 0, 0]),
        (False, {"eval_top_k": None}, PROBS),
        (False, {"eval_top_k": None, "normalize_weights": False}, PROBS),
        (True, {"eval_top_k": 1}, PROBS),
    ],
)
def test_weights(training: bool, changes: dict[str, Any], expected: list[float]) -> None:
    output = route(training, **changes)
    assert dense_weights(output)[0].tolist() == pytest.approx(expected, abs=1e-9)
    assert output.router_probs[0].tolist() == pytest.approx(PROBS)
    assert output.top_k == sum(weight > 0 for weight in expected)


def test_training_is_the_soft_router() -> None:
    router, soft, x = SoftThenTopK(8, 5), SoftRouter(8, 5), torch.randn(7, 8)
    assert isinstance(router, Router)
    soft.load_state_dict(router.state_dict())
    output, expected = router.train()(x), soft(x)
    assert torch.equal(output.combine_weights, expected.combine_weights)
    assert torch.equal(output.expert_indices, expected.expert_indices)
    output.combine_weights.square().sum().backward()
    assert (router.gate.weight.grad.abs().sum(1) > 0).all()


def test_top_k_is_that_of_evaluation() -> None:
    assert SoftThenTopK(8, 6).top_k == 3
    assert SoftThenTopK(8, 6, eval_top_k=None).top_k == 6
    router = build_router("lora_mixer", d_model=8, num_experts=6, eval_top_k=2)
    assert router.eval()(torch.randn(5, 8), None).top_k == router.top_k == 2


# -- absent experts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (True, [0, 0.25 / 0.45, 0, 0.10 / 0.45, 0.06 / 0.45, 0.04 / 0.45]),
        (False, [0, 0.25 / 0.41, 0, 0.10 / 0.41, 0.06 / 0.41, 0]),
    ],
)
def test_absent_experts_have_nothing_and_the_rest_sums_to_one(
    training: bool, expected: list[float]
) -> None:
    output = route(training, (0, 2))
    assert dense_weights(output)[0].tolist() == pytest.approx(expected)
    assert not {0, 2} & set(output.expert_indices.tolist())
    assert output.router_probs[0, [0, 2]].tolist() == [0, 0]
    assert float(output.router_probs.detach().sum()) == pytest.approx(1)
    assert output.router_logits.isfinite().all()


def test_fewer_experts_than_picks() -> None:
    assert dense_weights(route(False, (0, 1, 2, 3)))[0].tolist() == pytest.approx(
        [0, 0, 0, 0, 0.6, 0.4]
    )
    router = SoftThenTopK(8, 6)
    router.exclude([1, 2, 3, 4])
    assert router.top_k == 2
    assert router.eval()(torch.randn(4, 8)).top_k == 2
    router.exclude([])
    assert router.top_k == 3


def test_absent_experts_get_no_gradient_and_are_not_saved() -> None:
    router, x = SoftThenTopK(8, 4), torch.randn(5, 8)
    router.exclude([3])
    router.train()(x).combine_weights.square().sum().backward()
    assert (router.gate.weight.grad.abs().sum(1) > 0).tolist() == [True, True, True, False]
    assert list(router.state_dict()) == ["gate.weight"]


def test_exclude_names_mistakes() -> None:
    router = SoftThenTopK(8, 3)
    with pytest.raises(ValueError, match="expert=3: must be at least 0 and at most 2"):
        router.exclude([3])
    with pytest.raises(ValueError, match=r"experts=\[0, 1, 2\]: must leave at least one of 3"):
        router.exclude([0, 1, 2])
    assert router.present == (0, 1, 2)


# -- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [[], [1, 4]])
@pytest.mark.parametrize("changes", [{}, {"normalize_weights": False}, {"eval_top_k": None}])
def test_laws(changes: dict[str, Any], absent: list[int]) -> None:
    for check, d_model in (
        (assert_tokens_permute, 8),
        (assert_padding_is_nothing, 8),
        (assert_finite, 6),
    ):
        router = SoftThenTopK(d_model, 6, init_std=0.5, **changes)
        router.exclude(absent)
        check(router)


def test_padding_leaves_the_record() -> None:
    valid = torch.tensor([True, False, True])
    output = SoftThenTopK(8, 4)(torch.randn(3, 8), RoutingContext(1, 3, valid=valid))
    assert output.token_indices.tolist() == [0] * 4 + [2] * 4
    assert output.top_k is None


@pytest.mark.parametrize("eval_top_k", [0, 5])
def test_mistakes_are_named(eval_top_k: int) -> None:
    with pytest.raises(ValueError, match=f"eval_top_k={eval_top_k}: must be at least 1 and at mo"):
        SoftThenTopK(8, 4, eval_top_k=eval_top_k)
