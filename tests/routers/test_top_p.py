"""Top-p: sets and weights by hand, and the laws of a router."""

from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.core.protocols import Router
from routerlab.routers.top_p import TopP
from tests.routers.laws import (
    assert_finite,
    assert_padding_is_nothing,
    assert_tokens_permute,
    dense_weights,
    of_logits,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "normalized": {"normalize_weights": True, "top_p": 0.6},
    "dynmole": {"include_crossing": False, "min_experts": 2, "top_p": 0.75},
    "bounded": {"min_experts": 2, "max_experts": 3, "top_p": 0.9},
}


def route(probs: list[float], **changes: Any) -> Tensor:
    logits = torch.tensor([probs], dtype=torch.float64).log()
    return dense_weights(of_logits(TopP(len(probs), len(probs), **changes))(logits))[0]


@pytest.mark.parametrize(
    ("probs", "changes", "expected"),
    [
        ([0.5, 0.3, 0.2], {"top_p": 0.4}, [0.5, 0, 0]),
        ([0.5, 0.3, 0.2], {"top_p": 0.6}, [0.5, 0.3, 0]),
        ([0.2, 0.5, 0.3], {"top_p": 0.6, "normalize_weights": True}, [0, 0.625, 0.375]),
        ([0.5, 0.3, 0.2], {"top_p": 0.6, "max_experts": 1}, [0.5, 0, 0]),
        ([0.5, 0.3, 0.2], {"top_p": 0.4, "min_experts": 3}, [0.5, 0.3, 0.2]),
        ([0.5, 0.3, 0.2], {"top_p": 0.4, "include_crossing": False}, [0.5, 0, 0]),
        # DynMoLE below its entropy threshold: the sums are .7 and .8, not renormalised
        ([0.5, 0.2, 0.1, 0.1, 0.06, 0.04], VARIANTS["dynmole"], [0.5, 0.2, 0, 0, 0, 0]),
        ([0.7, 0.1, 0.08, 0.06, 0.04, 0.02], VARIANTS["dynmole"], [0.7, 0.1, 0, 0, 0, 0]),
    ],
)
def test_weights(probs: list[float], changes: dict[str, Any], expected: list[float]) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(route(probs, **changes), wanted)


def test_sure_tokens_use_fewer_experts() -> None:
    router = of_logits(TopP(8, 8, top_p=0.5))
    logits = torch.randn(8, dtype=torch.float64) * torch.tensor([[0.0], [0.5], [8.0]])
    counts = router(logits).dispatch_mask.sum(-1).tolist()
    assert counts[0] == 4  # uniform: 4/8 reaches one half
    assert counts[0] >= counts[1] > counts[2] == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_set_is_the_smallest_that_reaches_top_p(variant: str) -> None:
    router = TopP(8, 6, init_std=1.0, **VARIANTS[variant])
    assert isinstance(router, Router)
    assert not hasattr(router, "top_k")
    with torch.no_grad():
        output = router(torch.randn(100, 8))
    for probs, mask in zip(output.router_probs, output.dispatch_mask, strict=True):
        count, mass = int(mask.sum()), float(probs[mask].sum())
        low, high = router.min_experts, router.max_experts or 6
        assert low <= count <= high
        left = probs[~mask].amax() if count < 6 else torch.tensor(0.0)
        assert probs[mask].min() >= left
        if router.include_crossing:
            assert mass >= router.top_p or count == high
            assert mass - probs[mask].min() < router.top_p or count == low
        else:
            assert mass <= router.top_p or count == low
            assert mass + left > router.top_p


def test_gradients() -> None:
    # unnormalised weights reach all logits, normalised ones the chosen
    for normalize, reached in ((False, [True] * 3), (True, [True, True, False])):
        logits = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
        router = of_logits(TopP(3, 3, top_p=0.6, normalize_weights=normalize))
        router(logits).combine_weights[0].backward()
        assert (logits.grad != 0).tolist() == [reached]


@pytest.mark.parametrize("variant", VARIANTS)
def test_laws(variant: str) -> None:
    assert_tokens_permute(TopP(8, 6, init_std=0.5, **VARIANTS[variant]))
    assert_padding_is_nothing(TopP(8, 6, init_std=0.5, **VARIANTS[variant]))
    assert_finite(TopP(6, 6, **VARIANTS[variant]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_p": 0.0}, ["top_p=0.0", "above 0", "at most 1"]),
        ({"top_p": 1.1}, ["top_p=1.1", "above 0", "at most 1"]),
        ({"min_experts": 0}, ["min_experts=0", "at least 1", "at most 4"]),
        ({"min_experts": 3, "max_experts": 2}, ["max_experts=2", "at least 3", "at most 4"]),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        TopP(8, 4, **changes)
    for word in words:
        assert word in str(error.value)
