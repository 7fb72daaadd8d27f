"""DynMoLE's hybrid rule: numbers of its reference code, and the laws of a router."""

import math
from typing import Any

import pytest
import torch

from routerlab.core.config import compose
from routerlab.core.protocols import Router
from routerlab.core.routing import RoutingContext
from routerlab.losses.soft_load_balancing import SoftLoadBalancingLoss
from routerlab.losses.tsallis_entropy import TsallisEntropyLoss
from routerlab.ops.entropy import renyi_entropy, tsallis_entropy
from routerlab.routers.build import build_router
from routerlab.routers.entropy_gated import EntropyGated
from tests.routers.laws import (
    assert_finite,
    assert_padding_is_nothing,
    assert_tokens_permute,
    dense_weights,
    of_logits,
)

PEAKED = [0.7, 0.1, 0.08, 0.06, 0.04, 0.02]
FLAT = [0.3, 0.2, 0.15, 0.14, 0.11, 0.10]
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "normalized": {"normalize_weights": True},
    "renyi": {"entropy_type": "renyi", "entropy_threshold": 0.8},
    "never all": {"entropy_threshold": 1.0, "keep_top_k": 1},
    "always all": {"entropy_threshold": 0.0},
}


def route(probs: list[float], **changes: Any) -> list[float]:
    router = of_logits(EntropyGated(len(probs), len(probs), **changes))
    return dense_weights(router(torch.tensor([probs], dtype=torch.float64).log()))[0].tolist()


@pytest.mark.parametrize(
    ("probs", "changes", "expected"),
    [
        ([0.5, 0.2, 0.1, 0.1, 0.06, 0.04], {}, [0.5, 0.2, 0, 0, 0, 0]),
        (PEAKED, {}, [0.7, 0.1, 0, 0, 0, 0]),  # within .75 lies one, keep_top_k makes it two
        (PEAKED, {"keep_top_k": 1}, [0.7, 0, 0, 0, 0, 0]),
        ([0.4, 0.25, 0.09, 0.09, 0.09, 0.08], {}, [0.4, 0.25, 0.09, 0, 0, 0]),
        (FLAT, {}, FLAT),  # H = .95689: all
        (FLAT, {"entropy_threshold": 1.0}, [0.3, 0.2, 0.15, 0, 0, 0]),
        (FLAT, {"entropy_threshold": 0.96}, [0.3, 0.2, 0.15, 0, 0, 0]),
        ([1 / 6] * 6, {}, [1 / 6] * 6),  # H = .999664
        (PEAKED, {"normalize_weights": True}, [0.875, 0.125, 0, 0, 0, 0]),
        ([0.02, 0.1, 0.7, 0.08, 0.06, 0.04], {}, [0, 0.1, 0.7, 0, 0, 0]),
    ],
)
def test_weights(probs: list[float], changes: dict[str, Any], expected: list[float]) -> None:
    assert route(probs, **changes) == pytest.approx(expected, abs=1e-9)


def test_which_entropy_decides() -> None:
    # Tsallis and Renyi of index 1.1 differ by .006 here: a threshold between them tells them apart
    p = torch.tensor(FLAT, dtype=torch.float64)
    tsallis, renyi = float(tsallis_entropy(p)), float(renyi_entropy(p))
    assert abs(tsallis - renyi) > 1e-3
    threshold = (tsallis + renyi) / 2
    everyone = {
        kind: all(route(FLAT, entropy_type=kind, entropy_threshold=threshold))
        for kind in ("tsallis", "renyi")
    }
    assert everyone == {"tsallis": tsallis > renyi, "renyi": renyi > tsallis}


def test_losses_of_two_tokens() -> None:
    logits = torch.tensor([PEAKED, [1 / 6] * 6], dtype=torch.float64).log()
    with torch.no_grad():
        output = of_logits(EntropyGated(6, 6))(logits)
    entropy, balance = TsallisEntropyLoss(0.01), SoftLoadBalancingLoss(0.001)
    assert float(entropy(output)) == pytest.approx(0.789687, abs=1e-6)
    sums = balance.step_sums(output) / 2
    twelfth = [0.083333] * 4
    assert sums[:6].tolist() == pytest.approx([0.433333, 0.133333, *twelfth], abs=1e-6)
    probs = [0.433333, 0.133333, 0.123333, 0.113333, 0.103333, 0.093333]
    assert sums[6:].tolist() == pytest.approx(probs, abs=1e-6)
    assert float(balance(output)) == pytest.approx(1.45, abs=1e-6)
    total = entropy.weight * entropy(output) + balance.weight * balance(output)
    assert float(total) == pytest.approx(0.00934687, abs=1e-8)


def test_the_file_brings_these_losses_and_settings() -> None:
    cfg = compose("router=dynmole")
    assert {name: node.weight for name, node in cfg.loss.items()} == {
        "tsallis_entropy": 0.01,
        "soft_load_balancing": 0.001,
    }
    assert cfg.loss.soft_load_balancing.pool_layers is True
    router = build_router("dynmole", d_model=16, num_experts=6)
    assert (router.entropy_threshold, router.entropic_index, router.entropy_eps) == (0.9, 1.1, 1e-5)
    assert (router.top_p, router.keep_top_k) == (0.75, 2)


def test_the_gate_starts_within_kaimings_bounds() -> None:
    weight = EntropyGated(256, 8).gate.weight.detach()
    assert weight.abs().max() <= 256**-0.5
    assert float(weight.std()) == pytest.approx(1 / math.sqrt(3 * 256), rel=0.1)
    wide = EntropyGated(256, 8, init_std=0.5).gate.weight.detach()
    assert float(wide.std()) == pytest.approx(0.5, rel=0.1)


def test_the_record() -> None:
    router = EntropyGated(8, 6, init_std=0.5)
    assert isinstance(router, Router)
    assert router.causal
    assert not hasattr(router, "top_k")
    x = torch.randn(200, 8)
    output = router.train()(x)
    counts = output.dispatch_mask.sum(-1)
    unsure = tsallis_entropy(output.router_probs) > 0.9
    assert 0 < unsure.sum() < 200
    assert counts.min() >= router.keep_top_k
    assert (counts[unsure] == 6).all()
    mass = dense_weights(output).sum(-1)
    few = counts[~unsure] > 2
    assert (mass[~unsure][few] <= 0.75 + 1e-6).all()
    assert (mass <= 1 + 1e-6).all()
    assert torch.equal(dense_weights(router.eval()(x)), dense_weights(output))


@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_and_a_constant_can_be_exchanged(variant: str) -> None:
    router = of_logits(EntropyGated(6, 6, **VARIANTS[variant]))
    logits, order = torch.randn(9, 6, dtype=torch.float64), torch.randperm(6)
    expected = dense_weights(router(logits))
    torch.testing.assert_close(dense_weights(router(logits[:, order])), expected[:, order])
    torch.testing.assert_close(dense_weights(router(logits + 3)), expected)


def test_gradients() -> None:
    # unnormalised weights reach all logits, normalised ones the chosen
    for normalize, reached in ((False, [True] * 3), (True, [True, True, False])):
        logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
        router = of_logits(EntropyGated(3, 3, top_p=0.7, normalize_weights=normalize))
        output = router(logits)
        assert output.expert_indices.tolist() == [0, 1]
        output.combine_weights[0].backward()
        assert (logits.grad != 0).tolist() == [reached]


@pytest.mark.parametrize("variant", VARIANTS)
def test_laws(variant: str) -> None:
    assert_tokens_permute(EntropyGated(8, 6, init_std=0.5, **VARIANTS[variant]))
    assert_padding_is_nothing(EntropyGated(8, 6, init_std=0.5, **VARIANTS[variant]))
    assert_finite(EntropyGated(6, 6, **VARIANTS[variant]))


def test_nothing_but_padding() -> None:
    context = RoutingContext(1, 3, valid=torch.zeros(3, dtype=torch.bool))
    assert not len(EntropyGated(8, 6)(torch.randn(3, 8), context).token_indices)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"entropy_threshold": -0.1}, ["entropy_threshold=-0.1", "at least 0"]),
        ({"entropic_index": 0.0}, ["entropic_index=0.0", "above 0"]),
        ({"entropy_type": "shannon"}, ["entropy_type='shannon'", "'tsallis', 'renyi'"]),
        ({"entropy_eps": -1.0}, ["entropy_eps=-1.0", "at least 0"]),
        ({"top_p": 0.0}, ["top_p=0.0", "above 0", "at most 1"]),
        ({"keep_top_k": 5}, ["keep_top_k=5", "at least 1", "at most 4"]),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        EntropyGated(8, 4, **changes)
    for word in words:
        assert word in str(error.value)
