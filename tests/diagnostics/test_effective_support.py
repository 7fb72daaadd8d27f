"""Effective support sizes: numbers of the papers' examples, and exact whole ones."""

import pytest
import torch
from torch import Tensor

from routerlab.core.protocols import Diagnostic
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.diagnostics.collection import DiagnosticSums
from routerlab.diagnostics.effective_support import EffectiveSupport
from routerlab.routers.build import build_router
from tests.helpers.records import ragged_record, random_record

NAMES = {f"{kind}_{what}" for kind in ("probs_ess", "ess") for what in ("mean", "min", "p05")}
REMIX = [0.022, 0.933, 0.005, 0.010, 0.003, 0.015, 0.005, 0.007]


def measure(*outputs: RouterOutput) -> dict[str, float]:
    sums = DiagnosticSums({"support": EffectiveSupport()})
    for output in outputs:
        sums.add({"layer": output})
    return {name: value.item() for name, value in sums.values()["layer"].items()}


def top_k(probs: list[list[float]], count: int, normalize: bool = True) -> RouterOutput:
    p = torch.tensor(probs, dtype=torch.float64)
    picked = p.topk(count)
    weights = picked.values
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return RouterOutput.from_top_k(p.log(), p, picked.indices, weights)


def test_both_kinds_of_weights() -> None:
    assert isinstance(EffectiveSupport(), Diagnostic)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    found = measure(top_k(logits.softmax(-1).tolist(), 2))
    assert set(found) == NAMES
    assert found["probs_ess_mean"] == pytest.approx(2.0861, abs=5e-5)
    assert found["ess_mean"] == pytest.approx(1.648054, abs=5e-7)
    half_step = 0.5 / 683  # E = 4: 2049 steps
    for what in ("min", "p05"):
        assert found[f"probs_ess_{what}"] == pytest.approx(2.0861, abs=half_step + 5e-5)
        assert found[f"ess_{what}"] == pytest.approx(1.648054, abs=half_step + 5e-7)
    scaled = measure(top_k(logits.softmax(-1).tolist(), 2, normalize=False))
    assert scaled == pytest.approx(found)


@pytest.mark.parametrize(
    ("probs", "expected"),
    [(REMIX, 1.1476), ([0.0] * 7 + [1.0], 1.0), ([1 / 8] * 8, 8.0)],
)
def test_the_examples_of_the_remix_paper(probs: list[float], expected: float) -> None:
    found = measure(top_k([probs] * 3, 8))
    assert found["probs_ess_mean"] == pytest.approx(expected, abs=5e-5)
    assert found["ess_mean"] == pytest.approx(expected, abs=5e-5)
    assert found["ess_min"] == pytest.approx(expected, abs=0.5 / 293 + 5e-5)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 8, 64, 300, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_give_exactly_k(num_experts: int, dtype: torch.dtype) -> None:
    for k in {1, (num_experts + 1) // 2, num_experts}:
        probs = torch.full((5, num_experts), 1 / num_experts, dtype=dtype)
        weights = torch.full((5, k), 2 / 3, dtype=dtype)
        picks = torch.arange(k).expand(5, k)
        found = measure(RouterOutput.from_top_k(probs, probs, picks, weights))
        for what in ("min", "p05"):
            assert found[f"ess_{what}"] == k
            assert found[f"probs_ess_{what}"] == num_experts
        assert found["ess_mean"] == pytest.approx(k, rel=1e-12)


def test_a_router_of_constant_weights_has_exactly_k() -> None:
    router = build_router("subset_sampling", d_model=8, num_experts=8, top_k=3)
    context = RoutingContext(4, 5, seed=1)
    for training in (True, False):
        found = measure(router.train(training)(torch.randn(20, 8), context))
        assert found["ess_min"] == found["ess_p05"] == 3
        assert found["ess_mean"] == pytest.approx(3, abs=1e-12)


def of_sizes(counts: list[int], num_experts: int = 4) -> RouterOutput:
    """One token for each of ``counts``, with so many experts of weight 1."""
    mask = torch.arange(num_experts) < torch.tensor(counts)[:, None]
    flat = torch.full(mask.shape, 1 / num_experts, dtype=torch.float64)
    return RouterOutput.from_dispatch_mask(flat, flat, mask, mask.double())


@pytest.mark.parametrize(
    ("counts", "p05"),
    [
        ([1] + [3] * 18 + [4], 1),  # 1 of 20 is 5 %
        ([1] + [3] * 20, 3),  # 1 of 21 is not
        ([1, 2] + [3] * 37, 2),  # 2 of 39 are, 1 is not
        ([4] * 5 + [2], 2),
    ],
)
def test_the_percentile_is_the_smallest_that_one_in_twenty_reaches(
    counts: list[int], p05: int
) -> None:
    found = measure(of_sizes(counts))
    assert found["ess_min"] == min(counts)
    assert found["ess_p05"] == p05
    assert found["ess_mean"] == pytest.approx(sum(counts) / len(counts))


def test_against_every_token_in_turn() -> None:
    output = random_record(400, 6, 3)
    found = measure(output)
    probs, weights = output.router_probs, output.combine_weights.view(400, 3)
    for name, w in (("probs_ess", probs), ("ess", weights)):
        sizes = (w.sum(-1).square() / w.square().sum(-1)).sort().values
        assert found[f"{name}_mean"] == pytest.approx(float(sizes.mean()))
        step = 0.5 / 410  # E = 6
        assert found[f"{name}_min"] == pytest.approx(float(sizes[0]), abs=step)
        assert found[f"{name}_p05"] == pytest.approx(float(sizes[19]), abs=step)


def test_tokens_without_an_expert_are_left_out() -> None:
    assert measure(of_sizes([0, 2, 0, 4]))["ess_mean"] == 3
    assert measure(of_sizes([0, 2, 0, 4]))["ess_min"] == 2
    mask = torch.ones(2, 3, dtype=torch.bool)
    weights = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    output = RouterOutput.from_dispatch_mask(weights, weights.softmax(-1), mask, weights)
    assert measure(output)["ess_min"] == measure(output)["ess_mean"] == 2


def test_padding_is_left_out() -> None:
    valid = torch.tensor([True, False, True, False])
    padded = random_record(4, 5, 2, valid=valid)
    probs = padded.router_probs[valid]
    picked = probs.topk(2)
    alone = RouterOutput.from_top_k(probs.log(), probs, picked.indices, picked.values)
    assert measure(padded) == pytest.approx(measure(alone))
    nothing = random_record(4, 5, 2, valid=torch.zeros(4, dtype=torch.bool))
    assert measure(nothing) == dict.fromkeys(NAMES, 0.0)


def test_sums_add_up_over_micro_batches() -> None:
    parts = [ragged_record(7, 4, seed) for seed in range(3)]
    mask: Tensor = torch.cat([part.dispatch_mask for part in parts])
    probs = torch.cat([part.router_probs for part in parts])
    whole = RouterOutput.from_dispatch_mask(probs.log(), probs, mask, probs)
    assert measure(*parts) == pytest.approx(measure(whole))
