"""Sinkhorn routing: the plan in training, softmax in evaluation, and three kinds of gradient."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routerlab.core.protocols import Router
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.sinkhorn import sinkhorn_bias
from routerlab.routers.sinkhorn import Sinkhorn
from routerlab.routers.token_choice import TokenChoice


def router_of_logits(num_experts: int, **changes: Any) -> Sinkhorn:
    """A router whose logits are its input."""
    router = Sinkhorn(num_experts, num_experts, **changes).double()
    router.gate.weight.data = torch.eye(num_experts, dtype=torch.float64)
    return router


def dense_weights(output: RouterOutput) -> Tensor:
    """[T, E]."""
    dense = torch.zeros_like(output.router_probs)
    place = (output.token_indices, output.expert_indices)
    return dense.index_put(place, output.combine_weights, accumulate=True)


# -- values ---------------------------------------------------------------------------------------


def test_picks_and_weights_come_from_the_plan() -> None:
    # softmax(log C) = C; softmax alone would send both tokens to expert 0
    compatibility = torch.tensor([[0.95, 0.05], [0.90, 0.10]], dtype=torch.float64)
    router = router_of_logits(2, top_k=1, cost="softmax", xi=0.5, tol=1e-9)
    output = router(compatibility.log())
    assert output.expert_indices.tolist() == [0, 1]
    expected = torch.tensor([0.52498, 0.52498], dtype=torch.float64)
    torch.testing.assert_close(output.combine_weights, expected, rtol=0, atol=5e-6)
    assert router.eval()(compatibility.log()).expert_indices.tolist() == [0, 0]


@pytest.mark.parametrize(("xi", "loads"), [(1.0, [2, 3, 1]), (0.5, [2, 3, 1]), (0.05, [2, 2, 2])])
def test_hard_loads(xi: float, loads: list[int]) -> None:
    compatibility = torch.tensor(
        [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.4, 0.4, 0.2]]
        + [[0.5, 0.2, 0.3]],
        dtype=torch.float64,
    )
    router = router_of_logits(3, top_k=1, cost="softmax", xi=xi, tol=1e-9)
    output = router(compatibility.log())
    assert output.tokens_per_expert.tolist() == loads
    if xi == 0.05:
        row = torch.tensor([0.83728, 0.06513, 0.09760], dtype=torch.float64)
        torch.testing.assert_close(output.router_probs[0], row, rtol=0, atol=6e-6)
    assert router.eval()(compatibility.log()).tokens_per_expert.tolist() in ([6, 0, 0], [5, 1, 0])


@pytest.mark.parametrize("cost", ["logits", "softmax"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_record(cost: str, top_k: int) -> None:
    router, logits = router_of_logits(4, top_k=top_k, cost=cost, xi=0.3), torch.randn(32, 4)
    logits = logits.double()
    output = router(logits)
    compatibility = logits if cost == "logits" else logits.softmax(-1)
    log_u = torch.zeros(32, dtype=torch.float64)
    for _ in range(300):  # u and v to convergence
        log_v = torch.tensor(8.0).log() - (compatibility / 0.3 + log_u[:, None]).logsumexp(0)
        log_u = -(compatibility / 0.3 + log_v).logsumexp(1)
    pi = (compatibility / 0.3 + log_v + log_u[:, None]).exp()
    torch.testing.assert_close(output.router_probs, pi, rtol=0, atol=1e-4)
    best = pi.topk(top_k)
    expected = best.values if top_k == 1 else best.values / best.values.sum(1, keepdim=True)
    assert torch.equal(output.expert_indices.view(32, top_k), best.indices)
    torch.testing.assert_close(output.combine_weights.view(32, top_k), expected, rtol=0, atol=1e-4)
    assert isinstance(router, Router)
    assert (router.causal, router.causal_training) == (True, False)
    assert output.top_k == router.top_k == top_k
    torch.testing.assert_close(output.router_logits, logits)


def test_training_is_balanced_where_evaluation_is_not() -> None:
    logits = torch.randn(512, 8, dtype=torch.float64) + torch.arange(8) * 0.5
    router = router_of_logits(8, xi=0.1)
    worst = [router.train(mode)(logits).tokens_per_expert.max().item() for mode in (True, False)]
    assert worst[0] < 1.2 * 128 < 2.5 * 128 < worst[1]


@pytest.mark.parametrize("top_k", [1, 2])
def test_evaluation_is_the_softmax_router_bit_for_bit(top_k: int) -> None:
    x = torch.randn(50, 16)
    torch.manual_seed(1)
    router = Sinkhorn(16, 8, top_k, xi=0.2, init_std=1.0).eval()
    torch.manual_seed(1)
    softmax = TokenChoice(16, 8, top_k, normalize_weights=top_k > 1, init_std=1.0).eval()
    for ours, theirs in zip(_parts(router(x)), _parts(softmax(x)), strict=True):
        assert torch.equal(ours, theirs)


def _parts(output: RouterOutput) -> tuple[Tensor, ...]:
    return (
        output.router_logits,
        output.router_probs,
        output.expert_indices,
        output.combine_weights,
    )


# -- gradients ------------------------------------------------------------------------------------


def weight_gradient(logits: Tensor, **changes: Any) -> Tensor:
    """Of a fixed random function of the weights."""
    logits = logits.clone().requires_grad_()
    weights = dense_weights(router_of_logits(logits.shape[1], tol=0.0, **changes)(logits))
    generator = torch.Generator().manual_seed(5)
    targets = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
    (weights * targets).sum().backward()
    return logits.grad


def test_envelope_holds_log_v_constant() -> None:
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    router = router_of_logits(4, top_k=2, xi=0.5, tol=0.0)
    output = router(logits)
    picks = output.expert_indices.view(12, 2)
    bias = sinkhorn_bias(logits.detach() / 0.5, 1000, 1e-13)
    alpha = (logits / 0.5 + bias).gather(1, picks).softmax(1)
    torch.testing.assert_close(output.combine_weights.view(12, 2), alpha, rtol=1e-9, atol=1e-9)
    targets = torch.randn(12, 2, dtype=torch.float64)
    (expected,) = torch.autograd.grad((alpha * targets).sum(), logits)
    (ours,) = torch.autograd.grad((output.combine_weights.view(12, 2) * targets).sum(), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)
    assert ours.abs().max() > 1e-2


@pytest.mark.parametrize("cost", ["logits", "softmax"])
def test_unroll_is_the_gradient_of_the_whole_map(cost: str) -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    router = router_of_logits(3, top_k=2, cost=cost, xi=0.5, ot_grad="unroll", max_iter=5, tol=0.0)
    assert torch.autograd.gradcheck(lambda z: dense_weights(router(z)), logits)


def test_none_teaches_the_router_nothing() -> None:
    router = router_of_logits(4, ot_grad="none")
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert not router(logits).combine_weights.requires_grad
    assert router.eval()(logits).combine_weights.requires_grad


def test_unroll_knows_that_an_expert_bias_is_absorbed() -> None:
    # a constant added to one expert's logits leaves the plan as it is: its gradient is 0.
    # With log v held constant it looks as if it mattered.
    logits = torch.randn(40, 4, dtype=torch.float64)
    unroll = weight_gradient(logits, ot_grad="unroll", max_iter=200).sum(0)
    envelope = weight_gradient(logits, ot_grad="envelope", max_iter=200).sum(0)
    assert unroll.abs().max() < 1e-8
    assert envelope.abs().max() > 1e-2


def test_envelope_and_unroll_agree_as_one_token_counts_less() -> None:
    # a token moves log v by O(1/T): the gradients of its own weight differ by that
    differences = []
    for num_tokens in (8, 800):
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(num_tokens, 3, generator=generator, dtype=torch.float64)
        gradients = []
        for ot_grad in ("envelope", "unroll"):
            z = logits.clone().requires_grad_()
            output = router_of_logits(3, ot_grad=ot_grad, max_iter=50, tol=0.0)(z)
            output.combine_weights[0].backward()
            gradients.append(z.grad[0])
        differences.append(((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item())
    assert differences[0] > 2e-2
    assert differences[1] < 5e-3


def test_one_pick_has_a_gradient() -> None:
    for cost in ("logits", "softmax"):
        assert weight_gradient(torch.randn(9, 4).double(), top_k=1, cost=cost).norm() > 1e-2


# -- the contract of a router ---------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["logits", "softmax"])
def test_padding_changes_no_real_token(cost: str) -> None:
    valid = torch.tensor([True, True, False, True, True, False] * 4)
    x = torch.randn(24, 8)
    x[~valid] *= 100
    router = Sinkhorn(8, 4, cost=cost, xi=0.2, init_std=1.0)
    output, alone = router(x, RoutingContext(4, 6, valid=valid)), router(x[valid])
    assert torch.equal(output.router_probs[valid], alone.router_probs)
    assert torch.equal(output.expert_indices, alone.expert_indices)
    assert torch.equal(output.combine_weights, alone.combine_weights)
    assert output.valid is valid
    assert output.router_probs.isfinite().all()
    nothing = router(x, RoutingContext(4, 6, valid=torch.zeros_like(valid)))
    assert len(nothing.token_indices) == 0
    assert nothing.router_probs.isfinite().all()


def test_permuting_tokens_permutes_the_record() -> None:
    logits, order = torch.randn(20, 4, dtype=torch.float64), torch.randperm(20)
    router = router_of_logits(4, xi=0.2)
    torch.testing.assert_close(
        dense_weights(router(logits[order])), dense_weights(router(logits))[order]
    )


def test_what_a_token_adds_to_all_experts_does_not_slow_the_iterations() -> None:
    logits = torch.randn(20, 4, dtype=torch.float64)
    router = router_of_logits(4, xi=0.2, max_iter=3)
    shifted = logits + torch.randn(20, 1, dtype=torch.float64) * 10
    torch.testing.assert_close(router(shifted).router_probs, router(logits).router_probs)


@settings(deadline=None, max_examples=60)
@given(
    changes=st.fixed_dictionaries(
        {
            "cost": st.sampled_from(["logits", "softmax"]),
            "ot_grad": st.sampled_from(["envelope", "unroll"]),
            "top_k": st.integers(1, 4),
            "xi": st.sampled_from([0.05, 1.0]),
        }
    ),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 30.0, 1e4, 1e6]),
    training=st.booleans(),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_finite_for_finite_input(
    changes: dict[str, Any], scale: float, training: bool, seed: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)  # of the gate
    generator = torch.Generator().manual_seed(seed)
    router = Sinkhorn(8, 4, **changes, max_iter=10, init_std=1.0).to(dtype).train(training)
    x = (torch.randn(6, 8, generator=generator) * scale).to(dtype).requires_grad_()
    output = router(x)
    assert output.router_logits.dtype == torch.promote_types(dtype, torch.float32)
    for tensor in (output.router_logits, output.router_probs, output.combine_weights):
        assert tensor.isfinite().all()
    assert (output.combine_weights >= 0).all()
    torch.testing.assert_close(output.router_probs.sum(-1).float(), torch.ones(6))
    dense_weights(output).square().sum().backward()
    assert x.grad.isfinite().all()
    assert router.gate.weight.grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_float32_under_autocast_and_no_state(training: bool) -> None:
    router, x = Sinkhorn(64, 4, init_std=1.0).train(training), torch.randn(9, 64)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    random = torch.get_rng_state()
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = router(x)
    for ours, theirs in zip(_parts(output), _parts(plain), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 5}, ["top_k=5", "4"]),
        ({"cost": "distance"}, ["cost='distance'", "'logits'", "'softmax'"]),
        ({"xi": 0.0}, ["xi=0.0", "above 0"]),
        ({"max_iter": 0}, ["max_iter=0", "at least 1"]),
        ({"tol": -1.0}, ["tol=-1.0", "at least 0"]),
        ({"ot_grad": "implicit"}, ["ot_grad='implicit'", "'envelope'", "'none'", "'unroll'"]),
        ({"init_std": -1.0}, ["init_std=-1.0"]),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Sinkhorn(8, 4, **changes)
    for word in words:
        assert word in str(error.value)
