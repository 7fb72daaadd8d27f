"""Expert choice: the paper's rule by hand, its groups, its cap and its causal stand-in."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from routerlab.core.protocols import Router
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.moe.layer import MoE
from routerlab.routers.build import build_router
from routerlab.routers.expert_choice import ExpertChoice

LOGITS = torch.tensor([[2.0, 0], [1, 0], [0, 1], [3, 0]], dtype=torch.float64)  # n=4, e=2


def router_of_logits(num_experts: int, **changes: Any) -> ExpertChoice:
    """A router whose logits are its input."""
    router = ExpertChoice(num_experts, num_experts, **changes).double()
    router.gate.weight.data = torch.eye(num_experts, dtype=torch.float64)
    return router


def random_logits(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)


def picks(output: RouterOutput) -> list[list[int]]:
    """Each expert's tokens, the best first."""
    chosen = output.router_probs.masked_fill(~output.dispatch_mask, -1).T
    counts = output.tokens_per_expert.tolist()
    order = torch.argsort(chosen, dim=-1, descending=True, stable=True).tolist()
    return [tokens[:n] for tokens, n in zip(order, counts, strict=True)]


def dense_weights(output: RouterOutput) -> Tensor:
    """[T, E]."""
    dense = torch.zeros_like(output.router_probs)
    place = (output.token_indices, output.expert_indices)
    return dense.index_put(place, output.combine_weights, accumulate=True)


def by_loop(probs: Tensor, groups: list[list[int]], capacity_factor: float) -> Tensor:
    """The choice map by the definition: groups of real tokens, experts one by one."""
    mask = torch.zeros_like(probs, dtype=torch.bool)
    num_experts = probs.shape[1]
    for group in groups:
        exact = capacity_factor * len(group) / num_experts
        slots = min(len(group), max(1, int(exact + 1e-9)))  # 2.0 may come as 1.999...
        for expert in range(num_experts):
            column = probs[:, expert].tolist()
            ranked = sorted(group, key=column.__getitem__, reverse=True)
            mask[ranked[:slots], expert] = True
    return mask


# -- the rule by hand -----------------------------------------------------------------------------


def test_four_tokens_by_hand() -> None:
    output = router_of_logits(2, capacity_factor=1.0)(LOGITS)
    s = [[0.8808, 0.1192], [0.7311, 0.2689], [0.2689, 0.7311], [0.9526, 0.0474]]
    expected = torch.tensor(s, dtype=torch.float64)
    torch.testing.assert_close(output.router_probs, expected, rtol=0, atol=5e-5)
    assert picks(output) == [[3, 0], [2, 1]]  # softmax over tokens would give [[3, 0], [2, 0]]
    assert output.dispatch_mask.sum(1).tolist() == [1, 1, 1, 1]
    weights = dense_weights(output)
    g = [[0.880797, 0], [0, 0.268941], [0, 0.731059], [0.952574, 0]]
    torch.testing.assert_close(weights, torch.tensor(g, dtype=torch.float64), rtol=0, atol=5e-7)


def test_a_later_token_moves_an_earlier_one() -> None:
    later = LOGITS.clone()
    later[3] = torch.tensor([-3.0, 0])
    router = router_of_logits(2, capacity_factor=1.0)
    assert picks(router(later)) == [[0, 1], [3, 2]]  # token 1: from expert 1 to expert 0
    assert not router.causal


def test_the_layers_output_of_a_token() -> None:
    layer = MoE(2, 3, 2, router=router_of_logits(2, capacity_factor=1.0)).double()
    y, _ = layer(LOGITS)
    alone = layer.experts.expert(1, LOGITS[1:2], torch.ones(1, dtype=torch.float64))[0]
    torch.testing.assert_close(y[1], 0.2689414213699951 * alone)


@pytest.mark.parametrize(
    ("num_tokens", "capacity_factor", "num_experts", "slots"),
    [
        (100, 3.0, 64, 4),  # 4.69: flaxformer would round to 5
        (4096, 2.0, 64, 128),
        (7, 2.0, 4, 3),  # 3.5
        (50, 1.1, 11, 5),  # 5, not the 4 of 5.000000000000001's neighbour
        (3, 0.7, 7, 1),  # 0.3: at least one
        (1, 2.0, 64, 1),
        (5, 4.0, 4, 5),  # all of them
        (0, 2.0, 4, 0),
    ],
)
def test_slots(num_tokens: int, capacity_factor: float, num_experts: int, slots: int) -> None:
    router = ExpertChoice(2, num_experts, capacity_factor)
    assert router.slots(num_tokens) == slots
    output = router(torch.randn(num_tokens, 2))
    assert (output.tokens_per_expert == slots).all()


def test_the_realised_capacity_factor_of_a_short_group() -> None:
    output = ExpertChoice(8, 64, 3.0)(torch.randn(100, 8))
    assert len(output.token_indices) / 100 == 2.56


def test_the_leak_bound() -> None:  # c log2((1 - R) / R) bits a token and layer, R = c/e
    router = ExpertChoice(4, 16)
    share = router.capacity_factor / router.num_experts
    bits = router.capacity_factor * math.log2((1 - share) / share)
    assert bits == pytest.approx(5.614710, abs=1e-6)
    assert 9 * bits == pytest.approx(50.532389, abs=1e-5)


# -- groups, padding, sizes -----------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    num_experts=st.integers(2, 5),
    share=st.floats(0.1, 1.0),
    group=st.sampled_from(["sequence", "batch"]),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_loop_over_groups_of_real_tokens(
    lengths: list[int], num_experts: int, share: float, group: str, padded: bool, seed: int
) -> None:
    longest, batch_size = 7, len(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    if not padded:
        valid = torch.ones_like(valid)
    flat = valid.reshape(-1)
    places = torch.arange(batch_size * longest).view(batch_size, longest)
    groups = [places[b][valid[b]].tolist() for b in range(batch_size)]
    if group == "batch":
        groups = [sum(groups, [])]
    router = router_of_logits(num_experts, capacity_factor=share * num_experts, group=group)
    logits = random_logits(len(flat), num_experts, seed)
    context = RoutingContext(batch_size, longest, valid=flat if padded else None)
    output = router(logits, context)
    expected = by_loop(output.router_probs, groups, share * num_experts)
    assert torch.equal(output.dispatch_mask, expected)
    torch.testing.assert_close(dense_weights(output), output.router_probs * expected)
    assert int(output.num_dropped) == 0


def test_what_padding_holds_does_not_matter() -> None:
    router = router_of_logits(4, inference="thresholds")
    valid = torch.tensor([[True] * 5 + [False] * 3, [True] * 8]).reshape(-1)
    context = RoutingContext(2, 8, valid=valid)
    logits = random_logits(16, 4)
    junk = logits.clone()
    junk[~valid] = torch.tensor([1e4, -1e4, 0, torch.inf], dtype=torch.float64)
    plain, other = router(logits, context), router(junk, context)
    assert torch.equal(dense_weights(plain), dense_weights(other))
    assert torch.equal(plain.proposal, other.proposal)
    assert plain.valid is valid


def test_without_a_context_all_tokens_are_one_group() -> None:
    logits = random_logits(12, 4)
    alone = router_of_logits(4)(logits)
    batch = router_of_logits(4, group="batch")(logits, RoutingContext(3, 4))
    sequences = router_of_logits(4)(logits, RoutingContext(3, 4))
    assert torch.equal(alone.dispatch_mask, batch.dispatch_mask)
    assert not torch.equal(alone.dispatch_mask, sequences.dispatch_mask)


@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_equal_scores(num_tokens: int) -> None:
    output = router_of_logits(4)(torch.zeros(num_tokens, 4, dtype=torch.float64))
    assert (output.tokens_per_expert == max(1, num_tokens // 2)).all()
    assert output.dispatch_mask.sum() == len(output.token_indices)  # no pair twice
    assert (output.combine_weights == 0.25).all()


def test_a_batch_of_padding_only() -> None:
    valid = torch.zeros(6, dtype=torch.bool)
    router = router_of_logits(4, inference="thresholds")
    output = router(random_logits(6, 4), RoutingContext(2, 3, valid=valid))
    assert len(output.token_indices) == 0
    assert torch.equal(output.proposal, router.thresholds)


# -- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"max_experts_per_token": 2}])
def test_permuting_experts_or_tokens_permutes_the_result(changes: dict[str, Any]) -> None:
    router = router_of_logits(6, **changes)
    logits = random_logits(24, 6)
    plain = router(logits)
    experts, tokens = torch.randperm(6), torch.randperm(24)
    torch.testing.assert_close(
        dense_weights(router(logits[:, experts])), dense_weights(plain)[:, experts]
    )
    torch.testing.assert_close(dense_weights(router(logits[tokens])), dense_weights(plain)[tokens])


def test_float32_under_autocast_and_for_huge_logits() -> None:
    router, x = ExpertChoice(64, 4, init_std=1.0), torch.randn(10, 64)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = router(x)
    assert torch.equal(output.router_logits, plain.router_logits)
    assert torch.equal(output.router_probs, plain.router_probs)
    huge = router((x * 1e4).requires_grad_())
    torch.testing.assert_close(huge.router_probs.sum(-1), torch.ones(10))
    assert huge.combine_weights.isfinite().all()
    huge.combine_weights.sum().backward()
    assert router.gate.weight.grad.isfinite().all()


# -- gradients ------------------------------------------------------------------------------------


def test_the_gradient_flows_through_all_logits_of_chosen_tokens_only() -> None:
    logits = random_logits(8, 4).requires_grad_()
    output = router_of_logits(4, capacity_factor=1.0)(logits)
    chosen = output.dispatch_mask.any(1)
    assert 0 < (~chosen).sum() < 8
    targets = torch.linspace(-1, 2, 32, dtype=torch.float64).view(8, 4)
    (dense_weights(output) * targets).sum().backward()
    # the choice is a constant: the gradient is that of softmax through a fixed mask
    mask, free = output.dispatch_mask, logits.detach().clone().requires_grad_()
    (free.softmax(-1) * mask * targets).sum().backward()
    torch.testing.assert_close(logits.grad, free.grad)
    assert (logits.grad[~chosen] == 0).all()
    assert (logits.grad[chosen] != 0).all()


def test_a_token_that_nobody_picks_is_not_changed_and_teaches_nothing() -> None:
    logits = random_logits(8, 4)
    layer = MoE(4, 3, 4, router=router_of_logits(4, capacity_factor=1.0)).double()
    unpicked = ~layer(logits)[1].dispatch_mask.any(1)
    assert unpicked.any()
    x = logits.clone().requires_grad_()
    y, _ = layer(x)
    assert (y[unpicked] == 0).all()  # only the residual goes on
    y.square().sum().backward()
    assert (x.grad[unpicked] == 0).all()
    other = logits.clone()
    other[unpicked] -= 0.1  # a constant for all its logits: the scores and choices stay
    full = layer.router.gate.weight.grad.clone()
    layer.zero_grad()
    layer(other)[0].square().sum().backward()
    torch.testing.assert_close(layer.router.gate.weight.grad, full)


# -- the cap --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cap", [2, 3])
def test_the_cap_is_kept(cap: int, padded: bool) -> None:
    lengths = [64, 31, 3] if padded else [64, 64, 64]
    valid = (torch.arange(64) < torch.tensor(lengths)[:, None]).reshape(-1)
    context = RoutingContext(3, 64, valid=valid if padded else None)
    logits = random_logits(192, 8)
    free = router_of_logits(8)(logits, context)
    assert free.dispatch_mask.sum(1).max() > cap
    router = router_of_logits(8, max_experts_per_token=cap)
    output = router(logits, context)
    assert output.dispatch_mask.sum(1).max() <= cap
    slots = [router.slots(length) for length in lengths]
    expected = torch.tensor(slots)[:, None].expand(3, 8)
    assert torch.equal(output.dispatch_mask.view(3, 64, 8).sum(1), expected)
    torch.testing.assert_close(
        output.combine_weights, output.router_probs[output.dispatch_mask]
    )  # the weight is still S


def test_three_tokens_with_a_cap_by_hand() -> None:
    scores = [[0.34, 0.33, 0.33], [0.6, 0.25, 0.15], [0.5, 0.2, 0.3]]
    logits = torch.tensor(scores, dtype=torch.float64).log()
    free = router_of_logits(3, capacity_factor=1.0)
    assert picks(free(logits)) == [[1], [0], [0]]
    capped = router_of_logits(3, capacity_factor=1.0, max_experts_per_token=1)
    assert picks(capped(logits)) == [[1], [0], [2]]


def test_the_repair_can_be_switched_off() -> None:
    logits = random_logits(256, 16)
    router = router_of_logits(16, max_experts_per_token=2, cap_repair=False)
    assert router(logits).dispatch_mask.sum(1).max() > 2


def test_a_cap_of_all_experts_changes_nothing() -> None:
    logits = random_logits(32, 4)
    plain = router_of_logits(4)(logits)
    capped = router_of_logits(4, max_experts_per_token=4, cap_temperature=1e-4)(logits)
    assert torch.equal(plain.dispatch_mask, capped.dispatch_mask)


def test_a_group_too_small_for_one_token_an_expert() -> None:
    # 8 experts, 2 tokens with at most 3 experts each: 8 > 6
    capped = router_of_logits(8, max_experts_per_token=3)
    assert capped.slots(2) == 0
    assert capped.slots(3) == 1
    assert len(capped(random_logits(2, 8)).token_indices) == 0


# -- thresholds -----------------------------------------------------------------------------------


def trained(router: ExpertChoice, steps: int = 5) -> ExpertChoice:
    context = RoutingContext(2, 32)
    for step in range(steps):
        output = router(random_logits(64, router.num_experts, seed=step), context)
        router.update(output.requests_per_expert, output.proposal)
    return router.eval()


@pytest.mark.parametrize("cap", [None, 2])
@pytest.mark.parametrize("steps", [0, 5])
def test_thresholds_are_causal_in_evaluation(steps: int, cap: int | None) -> None:
    router = router_of_logits(4, inference="thresholds", max_experts_per_token=cap)
    assert router.causal
    assert not router.causal_training
    trained(router, steps)
    logits = random_logits(10, 4, seed=77)
    whole = dense_weights(router(logits))
    for length in range(1, 11):
        torch.testing.assert_close(dense_weights(router(logits[:length])), whole[:length])
    other = logits.clone()
    other[6:] = random_logits(4, 4, seed=78)
    torch.testing.assert_close(dense_weights(router(other))[:6], whole[:6])
    assert not torch.equal(dense_weights(router(other))[6:], whole[6:])


def test_what_training_proposes() -> None:
    # S[:, 0] sorted: .9526 .8808 .7311 .2689; S[:, 1]: .7311 .2689 .1192 .0474; k = 2
    router = router_of_logits(2, capacity_factor=1.0, inference="thresholds")
    expected = torch.tensor([0.880797, 0.268941], dtype=torch.float64)
    torch.testing.assert_close(router(LOGITS).proposal, expected, rtol=0, atol=5e-7)
    # two sequences of two, k = 1: the mean of .880797 and .952574, of .268941 and .731059
    proposal = router(LOGITS, RoutingContext(2, 2)).proposal
    expected = torch.tensor([(0.880797 + 0.952574) / 2, 0.5], dtype=torch.float64)
    torch.testing.assert_close(proposal, expected, rtol=0, atol=5e-7)
    # of the second sequence one token is real: weights 2/3 and 1/3
    valid = torch.tensor([True, True, True, False])
    proposal = router(LOGITS, RoutingContext(2, 2, valid=valid)).proposal
    expected = torch.tensor(
        [(2 * 0.880797 + 0.268941) / 3, (2 * 0.268941 + 0.731059) / 3], dtype=torch.float64
    )
    torch.testing.assert_close(proposal, expected, rtol=0, atol=5e-7)


def test_thresholds_are_a_mean_and_then_a_running_mean() -> None:
    router = ExpertChoice(2, 2, inference="thresholds", momentum=0.75)
    counts, seen = torch.ones(2, dtype=torch.long), []
    for value in (0.2, 0.4, 0.6, 0.8, 1.0):
        router.update(counts, torch.tensor([value, 0.5]))
        seen.append(float(router.thresholds[0]))
    # rates 1, 1/2, 1/3, 1/4, 1/4
    assert seen == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.625])
    assert float(router.thresholds[1]) == pytest.approx(0.5)


def test_scores_above_thresholds_by_hand() -> None:
    router = router_of_logits(2, capacity_factor=1.0, inference="thresholds")
    router.update(torch.ones(2, dtype=torch.long), torch.tensor([0.75, 0.1]))
    mask = router.eval()(LOGITS).dispatch_mask
    assert mask.tolist() == [[True, True], [False, True], [False, True], [True, False]]
    capped = router_of_logits(
        2, capacity_factor=1.0, inference="thresholds", max_experts_per_token=1
    )
    capped.load_state_dict(router.state_dict())
    mask = capped.eval()(LOGITS).dispatch_mask
    assert mask.tolist() == [[True, False], [False, True], [False, True], [True, False]]


def test_before_the_first_update_a_token_takes_its_best_experts() -> None:
    router = router_of_logits(4, capacity_factor=1.5, inference="thresholds").eval()
    logits = random_logits(9, 4)
    expected = torch.zeros(9, 4, dtype=torch.bool).scatter(1, logits.topk(2).indices, True)
    assert torch.equal(router(logits).dispatch_mask, expected)


def test_thresholds_keep_the_budget_on_fresh_tokens() -> None:
    router = router_of_logits(8, inference="thresholds", momentum=0.9)
    for step in range(50):
        output = router(random_logits(512, 8, seed=step))
        router.update(output.requests_per_expert, output.proposal)
    output = router.eval()(random_logits(8192, 8, seed=999))
    # 2 experts a token, each expert 2048 of 8192 (standard deviation 39 of its binomial count)
    counts = output.tokens_per_expert.double()
    assert (counts - 2048).abs().max() < 200


def test_only_update_changes_the_thresholds() -> None:
    router = router_of_logits(4, inference="thresholds")
    for training in (True, False):
        router.train(training)
        before = {name: value.clone() for name, value in router.state_dict().items()}
        output = router(random_logits(8, 4))
        for name, value in router.state_dict().items():
            assert torch.equal(value, before[name])
        assert (output.proposal is not None) is training
    proposal = torch.full((4,), 0.3)
    router.update(torch.ones(4, dtype=torch.long), proposal)
    torch.testing.assert_close(router.thresholds, proposal.double())


def test_thresholds_survive_saving() -> None:
    router = trained(router_of_logits(4, inference="thresholds"))
    other = router_of_logits(4, inference="thresholds").eval()
    logits = random_logits(9, 4)
    assert not torch.equal(other(logits).dispatch_mask, router(logits).dispatch_mask)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(logits).dispatch_mask, router(logits).dispatch_mask)
    assert other.num_updates == 5
    assert "thresholds" not in ExpertChoice(4, 4).state_dict()


# -- noise ----------------------------------------------------------------------------------------


def test_noise_in_training_only_and_divided_by_the_experts() -> None:
    router = router_of_logits(4, noise_std=2.0)
    logits = torch.zeros(5000, 4, dtype=torch.float64)
    context = RoutingContext(1, 5000, seed=3)
    output = router(logits, context)
    # N(0, (2/4)^2) in 20000 draws: the standard error of the deviation is .0025
    assert output.router_logits.std().item() == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(output.router_probs, output.router_logits.softmax(-1))
    assert torch.equal(output.router_logits, router(logits, context).router_logits)
    assert torch.equal(router.eval()(logits).router_logits, logits)
    with pytest.raises(ValueError, match="RoutingContext"):
        router.train()(logits)


# -- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cap"), [("expert_choice", None), ("expert_choice_capped", 3)])
def test_the_configs(name: str, cap: int | None) -> None:
    router = build_router(name, d_model=8, num_experts=4)
    assert isinstance(router, ExpertChoice)
    assert isinstance(router, Router)
    assert isinstance(router, nn.Module)
    assert router.max_experts_per_token == cap
    assert router.top_k == router.capacity_factor == 2.0
    output = router(torch.randn(12, 8))
    assert output.tokens_per_expert.tolist() == [6, 6, 6, 6]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"capacity_factor": 0.0}, "capacity_factor=0.0: must be above 0 and at most 4"),
        ({"capacity_factor": 4.5}, "capacity_factor=4.5: must be above 0 and at most 4"),
        ({"group": "token"}, "group='token': must be one of 'sequence', 'batch'"),
        ({"max_experts_per_token": 1}, "max_experts_per_token=1: must be at least 2"),
        ({"cap_temperature": 0.0}, "cap_temperature=0.0: must be at least 1e-06"),
        ({"cap_iterations": 0}, "cap_iterations=0: must be at least 1"),
        ({"inference": "top_k"}, "inference='top_k': must be one of 'batch', 'thresholds'"),
        ({"momentum": 1.0}, "momentum=1.0: must be at least 0 and below 1"),
        ({"noise_std": -1.0}, "noise_std=-1.0: must be at least 0"),
        ({"init_std": -1.0}, "init_std=-1.0: must be at least 0"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExpertChoice(4, 4, **changes)
