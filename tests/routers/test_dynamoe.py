"""DynaMoE: the published rule by hand, its fixed number of experts, and the rules that adapt it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.core.protocols import Router
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.dynamoe import DynaMoE
from tests.routers.laws import (
    assert_finite,
    assert_padding_is_nothing,
    assert_tokens_permute,
    dense_weights,
    of_logits,
)

MODES = ["percentile_token", "percentile_batch", "absolute", "cumulative"]


def route(logits: list[float], **changes: Any) -> tuple[list[int], Tensor]:
    router = of_logits(DynaMoE(len(logits), len(logits), **changes)).eval()
    output = router(torch.tensor([logits], dtype=torch.float64))
    return output.expert_indices.tolist(), output.combine_weights


def numbers(output: RouterOutput) -> Tensor:
    """Experts of each token."""
    return output.dispatch_mask.sum(-1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # g = [.6439, .2369, .0871, .0321], percentile .16201; softmax of the first two values
        ({"temperature": 1.0}, [0.6004, 0.3996]),
        ({"temperature": 1.0, "weight": "renorm"}, [0.7311, 0.2689]),
        # g = [.8650, .1171, .0158, .0021], percentile .06645
        ({}, [0.6787, 0.3213]),
    ],
)
def test_weights(changes: dict[str, Any], expected: list[float]) -> None:
    experts, weights = route([2.0, 1.0, 0.0, -1.0], percentile=0.5, **changes)
    assert experts == [0, 1]
    torch.testing.assert_close(
        weights, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-5
    )


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.16201), (0.5, 0.06645)])
def test_the_published_thresholds_choose_the_same(temperature: float, expected: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    gates = (logits / temperature).softmax(-1)
    threshold = gates.quantile(0.5)  # linear interpolation
    assert threshold.item() == pytest.approx(expected, abs=6e-6)
    experts, _ = route(logits.tolist(), percentile=0.5, temperature=temperature)
    assert (gates > threshold).nonzero().flatten().tolist() == experts


def test_ties() -> None:
    assert route([0.0] * 4, percentile=0.5)[0] == [0]  # nobody is above: the first best one
    assert route([5.0, 0.0, 0.0, 0.0], percentile=0.5)[0] == [0]  # three at the threshold


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_experts", [1, 4, 8, 16])
@pytest.mark.parametrize("percentile", [1e-6, 0.25, 0.5, 0.75, 0.9, 0.999999])
def test_as_published_the_number_of_experts_is_fixed(
    training: bool, num_experts: int, percentile: float
) -> None:
    router = DynaMoE(8, num_experts, percentile=percentile, init_std=1.0).train(training)
    found = numbers(router(torch.randn(200, 8), RoutingContext(1, 200))).double()
    assert found.var() == 0  # whatever the paper says of adaptivity
    expected = max(1, num_experts - 1 - int(percentile * (num_experts - 1)))
    assert found[0] == expected == router.top_k


def test_underflowing_gates_keep_their_number() -> None:
    # gates 1, 0, 0, 0 in float32; logits still rank them
    router = of_logits(DynaMoE(4, 4, percentile=0.5)).float().eval()
    output = router(torch.tensor([[400.0, -200.0, 100.0, 0.0]]))
    assert output.expert_indices.tolist() == [0, 2]


def test_noise_changes_which_experts_and_not_how_many() -> None:
    router = DynaMoE(8, 8, init_std=0.1)
    x, context = torch.randn(100, 8), RoutingContext(1, 100, seed=1)
    noisy, other = router(x, context), router(x, RoutingContext(1, 100, seed=2))
    assert torch.equal(noisy.dispatch_mask, router(x, context).dispatch_mask)
    assert not torch.equal(noisy.dispatch_mask, other.dispatch_mask)
    plain = router.eval()(x)
    assert not torch.equal(noisy.dispatch_mask, plain.dispatch_mask)
    assert torch.equal(numbers(noisy), numbers(plain))
    torch.testing.assert_close(noisy.router_probs, plain.router_probs)  # before noise
    assert torch.equal(plain.dispatch_mask, router(x, context).dispatch_mask)  # no draws


def test_noise_has_its_size_and_is_part_of_the_weights() -> None:
    # equal gates, 3 - 1 - floor(.2) = 2 chosen: ln(w_i / w_j) = .3 (n_i - n_j) of the two largest
    # of three normals, whose mean gap is .846284
    router = of_logits(DynaMoE(3, 3, percentile=0.1, noise_std=0.3)).float()
    output = router(torch.zeros(40_000, 3), RoutingContext(1, 40_000))
    logs = output.combine_weights.log().view(-1, 2)
    assert (logs[:, 0] - logs[:, 1]).abs().mean().item() == pytest.approx(0.3 * 0.846284, rel=0.03)


def test_noise_needs_a_context() -> None:
    with pytest.raises(ValueError, match="RoutingContext"):
        DynaMoE(8, 8)(torch.randn(3, 8))


@pytest.mark.parametrize("weight", ["softmax", "renorm"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
def test_weights_sum_to_one_and_stay_in_the_choice(mode: str, weight: str, training: bool) -> None:
    router = DynaMoE(8, 6, mode=mode, weight=weight, init_std=0.5).train(training)
    output = router(torch.randn(30, 8), RoutingContext(3, 10))
    weights = dense_weights(output)
    torch.testing.assert_close(weights.sum(-1), torch.ones(30))
    assert torch.equal(weights > 0, output.dispatch_mask)
    assert (numbers(output) >= 1).all()
    assert isinstance(router, Router)
    assert router.causal
    assert hasattr(router, "top_k") is (mode == "percentile_token")


# -- rules that adapt the number ------------------------------------------------------------------


def test_absolute() -> None:
    # above 1/8: .5 and .2
    probs = torch.tensor([0.5, 0.2, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01])
    experts, _ = route(probs.log().tolist(), mode="absolute", temperature=1.0)
    assert experts == [0, 1]
    nearly_uniform = [0.01 * i for i in range(8)]
    assert len(route(nearly_uniform, mode="absolute")[0]) == 4
    assert route(nearly_uniform, mode="absolute", factor=8.0)[0] == [7]


def test_cumulative() -> None:
    probs = torch.tensor([0.5, 0.2, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01])
    rule = {"mode": "cumulative", "temperature": 1.0}
    assert route(probs.log().tolist(), top_p=0.65, **rule)[0] == [0, 1]
    assert route(probs.log().tolist(), top_p=0.45, **rule)[0] == [0]


def test_the_number_varies_by_token() -> None:
    x = torch.randn(200, 8)
    for mode in MODES[1:]:
        router = DynaMoE(8, 8, mode=mode, init_std=0.3, noise_std=0.0)
        assert numbers(router(x, RoutingContext(1, 200))).double().var() > 0.1


def test_percentile_of_the_batch_fixes_the_mean_number() -> None:
    # 400 values; strictly above number floor(.75 * 399) = 299 lie 100
    router = of_logits(DynaMoE(8, 8, mode="percentile_batch", noise_std=0.0))
    logits = torch.randn(50, 8, dtype=torch.float64)
    output = router(logits)
    gates = (2 * logits).softmax(-1)
    threshold = gates.flatten().sort().values[299]
    torch.testing.assert_close(output.proposal, threshold[None])
    above = gates > threshold
    assert above.sum() == 100
    alone = ~above.any(-1)
    assert torch.equal(output.dispatch_mask[~alone], above[~alone])
    assert (numbers(output)[alone] == 1).all()
    assert not router.causal_training


def test_the_moving_average_is_used_in_evaluation_and_moved_by_update_only() -> None:
    router = of_logits(DynaMoE(4, 4, mode="percentile_batch", noise_std=0.0, ema_decay=0.75))
    assert router.threshold.tolist() == [0.25]  # 1/E
    x, requests = torch.randn(30, 4, dtype=torch.float64), torch.ones(4, dtype=torch.long)
    proposal = router(x).proposal
    assert router.threshold.tolist() == [0.25]
    router.update(requests, proposal)
    torch.testing.assert_close(router.threshold, 0.75 * 0.25 + 0.25 * proposal)
    output = router.eval()(x)
    assert output.proposal is None
    gates = (2 * x).softmax(-1)
    above = gates > router.threshold
    some = above.any(-1)
    assert torch.equal(output.dispatch_mask[some], above[some])
    later = x.clone()
    later[1:] = 9.0  # other tokens do not matter any more
    assert torch.equal(router(later).dispatch_mask[0], output.dispatch_mask[0])
    assert "threshold" in router.state_dict()
    assert "threshold" not in DynaMoE(4, 4).state_dict()


def test_the_percentile_counts_real_tokens() -> None:
    router = DynaMoE(8, 4, mode="percentile_batch", noise_std=0.0, init_std=0.5)
    x, valid = torch.randn(10, 8), torch.arange(10) < 6
    padded = router(x, RoutingContext(1, 10, valid=valid))
    alone = router(x[valid], RoutingContext(1, 6))
    torch.testing.assert_close(padded.proposal, alone.proposal)
    assert torch.equal(padded.dispatch_mask[valid], alone.dispatch_mask)
    nothing = router(x, RoutingContext(1, 10, valid=torch.zeros(10, dtype=torch.bool)))
    assert len(nothing.expert_indices) == 0
    torch.testing.assert_close(nothing.proposal, router.threshold)


# -- gradients and laws ---------------------------------------------------------------------------


def test_gradient_goes_through_both_softmaxes() -> None:
    # two experts chosen: w_0 = sigmoid(g_0 - g_1); g over all four
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    router = of_logits(DynaMoE(4, 4, percentile=0.5)).eval()
    router(logits).combine_weights[0].backward()
    other = logits.detach().requires_grad_()
    gates = (2 * other).softmax(-1)[0]
    (gates[0] - gates[1]).sigmoid().backward()
    torch.testing.assert_close(logits.grad, other.grad)
    assert (logits.grad[0, 2:] != 0).all()


def test_renormalised_weights_move_the_chosen_logits_only() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    router = of_logits(DynaMoE(4, 4, percentile=0.5, weight="renorm")).eval()
    router(logits).combine_weights[0].backward()
    assert (logits.grad != 0).tolist() == [[True, True, False, False]]


def test_one_expert_has_a_constant_weight() -> None:
    router = of_logits(DynaMoE(4, 4)).eval()  # 4 - 1 - floor(2.25)
    assert router.top_k == 1
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    output = router(logits)
    assert output.combine_weights.tolist() == [1.0] * 5
    output.combine_weights.sum().backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("mode", MODES)
def test_laws(mode: str) -> None:
    for weight in ("softmax", "renorm"):
        assert_tokens_permute(DynaMoE(8, 6, mode=mode, weight=weight, init_std=0.5))
        assert_padding_is_nothing(DynaMoE(8, 6, mode=mode, weight=weight, init_std=0.5))
        assert_finite(DynaMoE(6, 6, mode=mode, weight=weight))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "top_p"}, ["mode='top_p'", "'percentile_token'", "'cumulative'"]),
        ({"percentile": 0.0}, ["percentile=0.0", "above 0", "below 1"]),
        ({"percentile": 1.0}, ["percentile=1.0", "above 0", "below 1"]),
        ({"factor": 0.0}, ["factor=0.0", "above 0"]),
        ({"top_p": 1.5}, ["top_p=1.5", "at most 1"]),
        ({"temperature": 0.0}, ["temperature=0.0", "above 0"]),
        ({"noise_std": -1.0}, ["noise_std=-1.0", "at least 0"]),
        ({"weight": "flat"}, ["weight='flat'", "'softmax'", "'renorm'"]),
        ({"ema_decay": 1.0}, ["ema_decay=1.0", "below 1"]),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        DynaMoE(8, 4, **changes)
    for word in words:
        assert word in str(error.value)
