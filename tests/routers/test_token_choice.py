"""Token choice: the papers' rules by hand, and the contract of a router."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from routerlab.core.protocols import Router
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.token_choice import TokenChoice

VARIANTS: dict[str, dict[str, Any]] = {
    "mixtral": {"top_k": 2},
    "shazeer": {"top_k": 2, "order": "top_k_first"},
    "olmoe": {"top_k": 2, "normalize_weights": False},
    "switch": {"top_k": 1, "normalize_weights": False},
    "deepseek_v3": {"top_k": 2, "score_fn": "sigmoid", "route_scale": 2.5},
    "sigmoid": {"top_k": 2, "score_fn": "sigmoid", "normalize_weights": False},
    "all": {"top_k": 4},
}


def router_of_logits(num_experts: int, **changes: Any) -> TokenChoice:
    """A router whose logits are its input."""
    router = TokenChoice(num_experts, num_experts, **changes).double()
    router.gate.weight.data = torch.eye(num_experts, dtype=torch.float64)
    return router


def dense_weights(output: RouterOutput) -> Tensor:
    """[T, E]."""
    dense = torch.zeros_like(output.router_probs)
    place = (output.token_indices, output.expert_indices)
    return dense.index_put(place, output.combine_weights, accumulate=True)


def route(logits: list[float], **changes: Any) -> tuple[list[int], Tensor]:
    output = router_of_logits(len(logits), **changes)(torch.tensor([logits], dtype=torch.float64))
    return output.expert_indices.tolist(), output.combine_weights


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # logits [2, 1, 0, -1]: softmax = [.643914, .236883, .087144, .032059]
        ({"normalize_weights": False}, [0.643914, 0.236883]),
        ({}, [0.731059, 0.268941]),  # softmax of [2, 1]
        ({"order": "top_k_first"}, [0.731059, 0.268941]),
        # J: times a constant
        ({"route_scale": 2.5}, [2.5 * 0.731059, 2.5 * 0.268941]),
        ({"normalize_weights": False, "route_scale": 2.0}, [2 * 0.643914, 2 * 0.236883]),
        # sigmoid(2), sigmoid(1) = .880797, .731059; divided by their sum 1.611856
        ({"score_fn": "sigmoid", "normalize_weights": False}, [0.880797, 0.731059]),
        ({"score_fn": "sigmoid"}, [0.546449, 0.453551]),
    ],
)
def test_weights(changes: dict[str, Any], expected: list[float]) -> None:
    experts, weights = route([2.0, 1.0, 0.0, -1.0], top_k=2, **changes)
    assert experts == [0, 1]
    torch.testing.assert_close(
        weights, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=3e-6
    )


def test_sigmoid_probabilities_are_scores_over_their_sum() -> None:
    # s = [.9, .6, .5, .2], sum 2.2; top 2 = .9, .6 -> [.6, .4] x 2.5
    scores = torch.tensor([[0.9, 0.6, 0.5, 0.2]], dtype=torch.float64)
    router = router_of_logits(4, top_k=2, score_fn="sigmoid", route_scale=2.5)
    output = router(scores.logit())
    torch.testing.assert_close(output.router_probs, scores / 2.2)
    torch.testing.assert_close(
        output.combine_weights, torch.tensor([1.5, 1.0], dtype=torch.float64)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_record(variant: str) -> None:
    torch.manual_seed(0)
    router = TokenChoice(8, 4, **VARIANTS[variant], init_std=1.0)
    x = torch.randn(6, 8)
    output = router(x)
    assert isinstance(router, Router)
    assert router.causal
    assert output.top_k == router.top_k
    torch.testing.assert_close(output.router_logits, x @ router.gate.weight.T)
    torch.testing.assert_close(output.router_probs.sum(-1), torch.ones(6))
    picks = output.expert_indices.view(6, router.top_k)
    expected = output.router_logits.topk(router.top_k).indices
    assert torch.equal(picks.sort().values, expected.sort().values)
    if router.normalize_weights:
        sums = output.combine_weights.view(6, -1).sum(-1)
        torch.testing.assert_close(sums, torch.full((6,), router.route_scale))


# -- gradients (E) --------------------------------------------------------------------------------


def gate_gradient(changes: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    router = TokenChoice(x.shape[1], 5, init_std=1.0, **changes).double()
    weights = dense_weights(router(x))
    targets = torch.linspace(-1, 2, weights.numel(), dtype=torch.float64).view_as(weights)
    (weights * targets).sum().backward()
    return weights.detach(), router.gate.weight.grad


def test_top_k_first_is_softmax_then_renormalise() -> None:
    x = torch.randn(9, 6, dtype=torch.float64)
    a = gate_gradient({"top_k": 3, "order": "top_k_first"}, x)
    b = gate_gradient({"top_k": 3, "order": "score_first"}, x)
    assert a[1].abs().min() > 1e-6
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def logit_gradient(**changes: Any) -> Tensor:
    """Gradient of the top expert's weight with respect to the four logits of one token."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    output = router_of_logits(4, top_k=2, **changes)(logits)
    output.combine_weights[0].backward()
    return logits.grad[0]


def test_without_renormalising_the_gradient_reaches_all_logits() -> None:
    # d p0 / dz = p0 (1[i=0] - p_i) with the p above
    p = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64).softmax(-1)
    expected = p[0] * (torch.eye(4, dtype=torch.float64)[0] - p)
    torch.testing.assert_close(logit_gradient(normalize_weights=False), expected)


def test_renormalised_weights_move_the_picked_logits_only() -> None:
    # d sigma(z0 - z1) / dz0 = .731059 * .268941 = .196612
    expected = torch.tensor([0.196612, -0.196612, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(logit_gradient(), expected, rtol=0, atol=1e-6)


def test_sigmoid_gradients() -> None:
    # without the sum a score knows its own logit only: s (1 - s) = .880797 * .119203 = .104994
    expected = torch.tensor([0.104994, 0, 0, 0], dtype=torch.float64)
    got = logit_gradient(score_fn="sigmoid", normalize_weights=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    # g0 = s0/(s0+s1): dg0/dz0 = g0 g1 (1 - s0), dg0/dz1 = -g0 g1 (1 - s1); g0 g1 = .247842
    expected = torch.tensor([0.247842 * 0.119203, -0.247842 * 0.268941, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(logit_gradient(score_fn="sigmoid"), expected, rtol=0, atol=1e-6)


def test_the_choice_itself_has_no_gradient() -> None:
    output = TokenChoice(4, 4)(torch.randn(3, 4))
    assert not output.expert_indices.is_floating_point()
    assert not output.requests_per_expert.requires_grad
    assert output.combine_weights.requires_grad
    assert output.router_probs.requires_grad


# -- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_permuting_tokens_permutes_the_result(variant: str) -> None:
    torch.manual_seed(0)
    router = TokenChoice(8, 4, **VARIANTS[variant], init_std=1.0).double()
    x, order = torch.randn(7, 8, dtype=torch.float64), torch.randperm(7)
    plain, moved = router(x), router(x[order])
    torch.testing.assert_close(moved.router_probs, plain.router_probs[order])
    torch.testing.assert_close(dense_weights(moved), dense_weights(plain)[order])
    assert torch.equal(moved.requests_per_expert, plain.requests_per_expert)


@pytest.mark.parametrize("variant", ["mixtral", "shazeer", "olmoe", "switch", "all"])
def test_a_constant_added_to_all_logits_changes_nothing(variant: str) -> None:
    router = router_of_logits(4, **VARIANTS[variant])
    logits = torch.randn(5, 4, dtype=torch.float64)
    plain, shifted = router(logits), router(logits + 3.5)
    torch.testing.assert_close(shifted.router_probs, plain.router_probs)
    torch.testing.assert_close(dense_weights(shifted), dense_weights(plain))


@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid"])
@pytest.mark.parametrize("logits", [[200.0, 0.0, 5.0, 90.0], [22.0, 20.0, 25.0, 30.0]])
def test_saturated_scores_do_not_blur_the_choice(score_fn: str, logits: list[float]) -> None:
    # float32: sigmoid(20) and up are 1.0, softmax of 110 below the largest is 0.0
    router = router_of_logits(4, top_k=2, score_fn=score_fn).float()
    output = router(torch.tensor([logits]))
    assert output.expert_indices.tolist() == torch.tensor(logits).topk(2).indices.tolist()


@settings(deadline=None, max_examples=40)
@given(
    variant=st.sampled_from(list(VARIANTS)),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_finite_for_finite_input(variant: str, scale: float, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    router = TokenChoice(8, 4, **VARIANTS[variant], init_std=1.0).to(dtype)
    x = (torch.randn(5, 8, generator=generator) * scale).to(dtype).requires_grad_()
    output = router(x)
    assert output.router_logits.dtype == torch.promote_types(dtype, torch.float32)
    for tensor in (output.router_logits, output.router_probs, output.combine_weights):
        assert tensor.isfinite().all()
    torch.testing.assert_close(output.router_probs.sum(-1).double(), torch.ones(5).double())
    dense_weights(output).square().sum().backward()
    assert x.grad.isfinite().all()
    assert router.gate.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_stay_float32_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    router, x = TokenChoice(64, 4, init_std=1.0).to(dtype), torch.randn(5, 64, dtype=dtype)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = router(x)
    assert output.router_logits.dtype == torch.float32
    assert torch.equal(output.router_logits, plain.router_logits)  # not rounded on the way either
    exact = x.double() @ router.gate.weight.double().T
    torch.testing.assert_close(output.router_logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_forward_changes_no_state() -> None:
    for training in (True, False):
        router = TokenChoice(8, 4, jitter_eps=0.1, capacity_factor=1.0).train(training)
        before = {name: value.clone() for name, value in router.state_dict().items()}
        random = torch.get_rng_state()
        router(torch.randn(5, 8, generator=torch.Generator()), RoutingContext(1, 5))
        assert torch.equal(random, torch.get_rng_state())
        for name, value in router.state_dict().items():
            assert torch.equal(value, before[name])


# -- padding and capacity -------------------------------------------------------------------------


def test_padding_picks_nothing() -> None:
    valid = torch.tensor([True, True, False, True, False, False])
    router = TokenChoice(8, 4, init_std=1.0)
    x = torch.randn(6, 8)
    output = router(x, RoutingContext(2, 3, valid=valid))
    alone = router(x[valid])
    assert output.token_indices.tolist() == [0, 0, 1, 1, 3, 3]
    assert torch.equal(output.expert_indices, alone.expert_indices)
    torch.testing.assert_close(output.combine_weights, alone.combine_weights)
    assert output.valid is valid


def test_capacity_keeps_the_weights_of_the_rest() -> None:
    # logits rank experts 0, 1 for every token: 4 tokens, K=2, E=4, factor 1 -> 2 slots each,
    # so expert 0 and expert 1 keep tokens 0 and 1 and lose tokens 2 and 3
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 4, dtype=torch.float64)
    output = router_of_logits(4, top_k=2, capacity_factor=1.0)(logits)
    assert output.token_indices.tolist() == [0, 0, 1, 1]
    assert output.dropped_per_expert.tolist() == [2, 2, 0, 0]
    assert output.requests_per_expert.tolist() == [4, 4, 0, 0]
    expected = torch.tensor([2.0, 1.0], dtype=torch.float64).softmax(-1).repeat(2)
    torch.testing.assert_close(output.combine_weights, expected)


def test_capacity_counts_real_tokens() -> None:
    # 2 real tokens of 4: ceil(1 * 2 * 1 / 2) = 1 slot; with padding counted it would be 2
    logits = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    router = router_of_logits(2, top_k=1, normalize_weights=False, capacity_factor=1.0)
    valid = torch.tensor([False, True, True, False])
    output = router(logits, RoutingContext(1, 4, valid=valid))
    assert output.token_indices.tolist() == [1]
    assert output.dropped_per_expert.tolist() == [1, 0]


@pytest.mark.parametrize(("top_k", "causal"), [(1, True), (2, False)])
def test_capacity_with_second_choices_looks_ahead_and_says_so(top_k: int, causal: bool) -> None:
    # second choices wait for ALL first choices. Two slots an expert (top_k 2), one
    # (top_k 1). Token 0's second choice is expert 1; tokens 2 and 3 may take both of its slots.
    calm = torch.tensor([[2.0, 1, 0, -1], [2, 0, 1, -1], [-1, 0, 2, 1], [-1, 0, 1, 2]])
    busy = calm.clone()
    busy[2:] = torch.tensor([-1.0, 2, 0, 1])
    router = router_of_logits(4, top_k=top_k, normalize_weights=top_k > 1, capacity_factor=1.0)
    past = [router(logits.double()).dispatch_mask[:2] for logits in (calm, busy)]
    assert torch.equal(*past) is causal
    assert router.causal_training is causal
    assert router.causal  # evaluation is dropless ...
    knobs = {"top_k": top_k, "normalize_weights": top_k > 1, "eval_capacity_factor": 1.0}
    assert router_of_logits(4, **knobs).causal is causal  # ... unless it has a capacity, too


# -- jitter ---------------------------------------------------------------------------------------


def test_jitter_in_training_only_and_within_its_bounds() -> None:
    router = router_of_logits(4, jitter_eps=0.1)
    x = torch.rand(50, 4, dtype=torch.float64) + 1
    context = RoutingContext(1, 50, seed=3)
    ratio = router(x, context).router_logits / x
    assert 0.9 <= ratio.min() < 0.92  # 200 uniform draws: 0.9^200 = 7e-10 to miss a tenth
    assert 1.08 < ratio.max() <= 1.1
    assert torch.equal(router.eval()(x).router_logits, x)  # needs no context then


def test_jitter_is_a_function_of_seed_and_layer() -> None:
    router, x = router_of_logits(4, jitter_eps=0.1), torch.ones(5, 4, dtype=torch.float64)
    contexts = [RoutingContext(1, 5, seed=s, layer=layer) for s, layer in [(0, 0), (0, 1), (1, 0)]]
    draws = [router(x, context).router_logits for context in contexts]
    assert torch.equal(draws[0], router(x, contexts[0]).router_logits)  # as when recomputing
    assert all(not torch.equal(a, b) for a, b in pairwise([*draws, draws[0]]))


def test_jitter_needs_a_context() -> None:
    with pytest.raises(ValueError, match="RoutingContext"):
        TokenChoice(4, 4, jitter_eps=0.1)(torch.ones(2, 4))


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 0}, ["top_k=0", "at least 1", "at most 4"]),
        ({"top_k": 5}, ["top_k=5", "at least 1", "at most 4"]),
        ({"score_fn": "relu"}, ["score_fn='relu'", "'softmax'", "'sigmoid'"]),
        ({"order": "last"}, ["order='last'", "'score_first'", "'top_k_first'"]),
        ({"order": "top_k_first", "score_fn": "sigmoid"}, ["top_k_first", "'sigmoid'", "softmax"]),
        ({"order": "top_k_first", "normalize_weights": False}, ["normalize_weights", "False"]),
        ({"top_k": 1}, ["top_k=1", "normalize_weights=true", "no gradient", "false"]),
        ({"top_k": 1, "score_fn": "sigmoid"}, ["top_k=1", "normalize_weights=true"]),
        ({"capacity_factor": 0.0}, ["capacity_factor=0.0", "above 0", "null"]),
        ({"jitter_eps": 1.0}, ["jitter_eps=1.0", "0", "below 1"]),
        ({"jitter_eps": -0.1}, ["jitter_eps=-0.1", "0", "below 1"]),
        ({"route_scale": 0.0}, ["route_scale=0.0", "above 0"]),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        TokenChoice(8, 4, **changes)
    for word in words:
        assert word in str(error.value)


# -- DeepSeekMoE (F) ------------------------------------------------------------------------------


def test_routed_scores_sum_to_less_than_one_over_all_experts() -> None:
    # g is the softmax score over the N' routed experts, not renormalised
    router = router_of_logits(4, top_k=2, normalize_weights=False)
    logits = torch.randn(6, 4, dtype=torch.float64)
    weights = dense_weights(router(logits))
    expected = F.softmax(logits, -1)
    torch.testing.assert_close(weights[weights > 0], expected[weights > 0])
    assert (weights.sum(-1) < 1).all()
