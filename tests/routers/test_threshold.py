"""Threshold routing: sets and weights by hand, and the laws of a router."""

from typing import Any

import pytest
import torch

from routerlab.core.protocols import Router
from routerlab.routers.threshold import Threshold
from tests.routers.laws import (
    assert_finite,
    assert_padding_is_nothing,
    assert_tokens_permute,
    dense_weights,
    of_logits,
)

PROBS = [0.5, 0.2, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.5, 0.2]),  # above 1/8
        ({"factor": 0.7}, [0.5, 0.2, 0.1]),  # above .0875
        ({"factor": 2.0}, [0.5]),
        ({"factor": 6.0}, [0.5]),  # nobody is above .75: the best one
        ({"normalize_weights": True}, [0.714286, 0.285714]),
    ],
)
def test_weights(changes: dict[str, Any], expected: list[float]) -> None:
    logits = torch.tensor([PROBS], dtype=torch.float64).log()
    output = of_logits(Threshold(8, 8, **changes))(logits)
    assert output.expert_indices.tolist() == list(range(len(expected)))
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(output.combine_weights, wanted, rtol=0, atol=1e-6)


def test_the_record() -> None:
    router = Threshold(8, 6, init_std=0.5)
    assert isinstance(router, Router)
    assert not hasattr(router, "top_k")
    output = router(torch.randn(100, 8))
    counts = output.dispatch_mask.sum(-1)
    assert counts.min() >= 1
    assert counts.double().var() > 0
    assert torch.equal(output.dispatch_mask, output.router_probs > 1 / 6)
    expected = output.router_probs * output.dispatch_mask
    torch.testing.assert_close(dense_weights(output), expected)


def test_gradients() -> None:
    for normalize, reached in ((False, [True] * 3), (True, [True, True, False])):
        logits = torch.tensor([[1.0, 0.8, 0.0]], dtype=torch.float64, requires_grad=True)
        router = of_logits(Threshold(3, 3, normalize_weights=normalize))
        router(logits).combine_weights[0].backward()
        assert (logits.grad != 0).tolist() == [reached]


@pytest.mark.parametrize("normalize", [False, True])
def test_laws(normalize: bool) -> None:
    assert_tokens_permute(Threshold(8, 6, normalize_weights=normalize, init_std=0.5))
    assert_padding_is_nothing(Threshold(8, 6, normalize_weights=normalize, init_std=0.5))
    assert_finite(Threshold(6, 6, normalize_weights=normalize))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"factor=0.0: must be above 0"):
        Threshold(8, 4, factor=0.0)
