"""Token choice with noise, groups, second choices, queues and a balancer."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.balancers.bip import BIP
from routerlab.balancers.expert_bias import ExpertBias
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.token_choice import TokenChoice


def router_of_logits(num_experts: int, **changes: Any) -> TokenChoice:
    """A router whose logits are its input."""
    router = TokenChoice(num_experts, num_experts, **changes).double()
    router.gate.weight.data = torch.eye(num_experts, dtype=torch.float64)
    return router


def logits_of(scores: list[float]) -> Tensor:
    """Logits whose sigmoid is ``scores``."""
    return torch.tensor([scores], dtype=torch.float64).logit()


def context(tokens: int, seed: int = 0) -> RoutingContext:
    return RoutingContext(1, tokens, seed=seed)


# -- balancer -------------------------------------------------------------------------------------


def test_bias_moves_the_choice_and_not_the_weights() -> None:
    # s = [.9 .6 .5 .2], b = [-.5 0 0 .35]: s + b = [.4 .6 .5 .55] picks {1, 3}; weights .6, .2 / .8
    knobs = {"score_fn": "sigmoid", "route_scale": 2.5, "balancer": ExpertBias}
    router = router_of_logits(4, **knobs)
    router.balancer.bias.copy_(torch.tensor([-0.5, 0.0, 0.0, 0.35]))
    output = router(logits_of([0.9, 0.6, 0.5, 0.2]))
    assert output.expert_indices.tolist() == [1, 3]
    torch.testing.assert_close(output.combine_weights, torch.tensor([1.875, 0.625]).double())
    assert output.proposal is router.balancer.bias


def test_one_constant_on_all_biases_changes_nothing() -> None:
    router = router_of_logits(6, score_fn="sigmoid", balancer=ExpertBias)
    router.balancer.bias.copy_(torch.randn(6) / 10)
    x = torch.randn(50, 6, dtype=torch.float64)
    before = router(x).expert_indices
    router.balancer.bias += 3.0
    assert torch.equal(router(x).expert_indices, before)


def test_no_gradient_through_the_bias() -> None:
    router = router_of_logits(4, balancer=partial(BIP, iterations=2))
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    output = router(x)
    (slope,) = torch.autograd.grad(output.combine_weights.square().sum(), x)
    # the same picks without a balancer have the same gradient
    plain = x.detach().requires_grad_()
    probs = plain.softmax(-1)[output.token_indices, output.expert_indices].view(8, 2)
    weights = probs / probs.sum(-1, keepdim=True)
    (expected,) = torch.autograd.grad(weights.square().sum(), plain)
    torch.testing.assert_close(slope, expected)


def test_update_reaches_the_balancer() -> None:
    router = TokenChoice(8, 4, balancer=partial(ExpertBias, rate=0.5))
    router.update(torch.tensor([8, 0, 4, 4]), torch.zeros(4))
    assert router.balancer.bias.tolist() == [-0.5, 0.5, 0, 0]


def test_bip_balances_and_makes_training_look_ahead() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 8, dtype=torch.float64) + torch.arange(8) / 4
    plain, priced = router_of_logits(8), router_of_logits(8, balancer=BIP)
    violation = [r(x).expert_load.max().item() * 8 - 1 for r in (plain, priced)]
    assert violation[0] > 0.8
    assert violation[1] < 0.2
    assert priced.causal
    assert not priced.causal_training
    assert router_of_logits(8, balancer=partial(BIP, mode="causal")).causal_training


# -- groups ---------------------------------------------------------------------------------------


def test_groups_by_their_two_best_with_a_bias_and_by_their_best_without() -> None:
    # groups of 2: top-2 sums [1.0, 1.15, 1.0, .3] keep group 1; the best single score is in group 0
    logits = logits_of([0.9, 0.1, 0.6, 0.55, 0.5, 0.5, 0.2, 0.1])
    knobs: dict[str, Any] = {"score_fn": "sigmoid", "num_groups": 4}
    biased = router_of_logits(8, **knobs, balancer=ExpertBias)
    assert biased(logits).expert_indices.tolist() == [2, 3]
    assert router_of_logits(8, **knobs)(logits).expert_indices.tolist() == [0, 1]


def test_forbidden_groups_are_never_picked_however_low_the_allowed_scores() -> None:
    # experts 0, 1 are the allowed group with the best expert; expert 1 has the lowest score of all.
    # A mask of 0 instead of minus infinity would prefer any forbidden expert over a negative score
    logits = torch.tensor([[9.0, -9.0, 8.0, 7.0]], dtype=torch.float64)
    router = router_of_logits(4, num_groups=2)
    assert router(logits).expert_indices.tolist() == [0, 1]


# -- noise ----------------------------------------------------------------------------------------


NOISY: dict[str, Any] = {"noise": True, "order": "top_k_first"}


def test_selection_probability_by_hand() -> None:
    # K=1, clean [1, 0, -1], raw std 0: sd = ln 2 + .01 = .703147. Without noise drawn the others'
    # best is [0, 1, 1]: Phi(1 / sd), Phi(-1 / sd), Phi(-2 / sd)
    from routerlab.ops.noise import selection_probability

    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    std = torch.full_like(logits, 0.703147)
    found = selection_probability(logits, logits, std, 1)
    expected = torch.tensor([[0.922513, 0.077487, 0.002225]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_selection_probability_is_the_frequency_under_fresh_noise() -> None:
    router = router_of_logits(4, **NOISY)
    x = torch.tensor([[0.5, 0.2, 0.0, -0.4]], dtype=torch.float64)
    outputs = [router(x, context(1, seed)) for seed in range(4000)]
    frequency = torch.stack([o.dispatch_mask[0].double() for o in outputs]).mean(0)
    chance = torch.stack([o.selection_probs[0] for o in outputs]).mean(0)
    torch.testing.assert_close(chance, frequency, atol=0.02, rtol=0)
    assert frequency.sum() == pytest.approx(2)


def test_noise_is_drawn_in_training_only_and_learns_its_size() -> None:
    router = router_of_logits(4, **NOISY)
    assert not router.noise_gate.weight.any()  # zero at first, as in the paper
    x = torch.randn(20, 4, dtype=torch.float64)
    same, other = router(x, context(20)), router(x, context(20, 1))
    assert not torch.equal(same.combine_weights, other.combine_weights)
    assert torch.equal(same.combine_weights, router(x, context(20)).combine_weights)
    same.combine_weights.square().sum().backward()
    assert router.noise_gate.weight.grad.any()
    calm = router.eval()(x)
    assert calm.selection_probs is None
    torch.testing.assert_close(calm.combine_weights.view(20, 2), x.topk(2).values.softmax(-1))


# -- second choices -------------------------------------------------------------------------------


def test_second_choices_are_used_in_proportion_to_their_weight() -> None:
    # weights [.9, .1]; threshold .2: the second is used half of the time, .05: always
    logits = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log().repeat(4000, 1)
    for threshold, expected in ((0.2, 0.5), (0.05, 1.0), (0.5, 0.2)):
        router = router_of_logits(2, second_choice_threshold=threshold)
        output = router(logits, context(4000))
        counts = output.tokens_per_expert.tolist()
        assert counts[0] == 4000
        assert counts[1] / 4000 == pytest.approx(expected, abs=0.03)
        assert output.num_dropped == 0  # not wanted is not dropped
        assert len(router.eval()(logits).token_indices) == 8000


def test_unused_second_choices_take_no_slot() -> None:
    # token 0 would take expert 1's only slot with its second choice (weight 1e-9: never used)
    logits = torch.tensor([[20.0, 0.0, -20.0, -20.0], [0.0, 20.0, -20.0, -20.0]]).double()
    router = router_of_logits(4, second_choice_threshold=1.0, capacity_factor=1.0)
    output = router(logits, context(2))  # ceil(1 * 2 * 2 / 4) = 1 slot
    assert output.token_indices.tolist() == [0, 1]
    assert output.expert_indices.tolist() == [0, 1]
    assert output.num_dropped == 0


# -- queues ---------------------------------------------------------------------------------------


def kept(policy: str) -> list[tuple[int, int]]:
    """Who gets the one slot of each expert. Softmax weights (two experts):
    token 0: .6 .4, token 1: .9 .1, token 2: .2 .8
    """
    probs = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    knobs: dict[str, Any] = {"normalize_weights": False, "drop_policy": policy}
    router = router_of_logits(2, top_k=2, capacity_factor=1 / 3, **knobs)
    output = router(probs.log())
    return list(zip(output.token_indices.tolist(), output.expert_indices.tolist(), strict=True))


def test_queue_orders() -> None:
    assert kept("position") == [(0, 0), (2, 1)]  # first come among first choices
    assert kept("batch_priority") == [(1, 0), (2, 1)]  # token 1 is surest of expert 0
    assert kept("probability") == [(1, 0), (2, 1)]


def test_probability_looks_at_weights_and_not_at_the_rank_of_the_choice() -> None:
    # expert 1 is token 0's second choice with .45, and token 1's first choice with .4 (of three)
    probs = torch.tensor([[0.5, 0.45, 0.05], [0.3, 0.4, 0.3]], dtype=torch.float64)
    knobs: dict[str, Any] = {"normalize_weights": False, "capacity_factor": 0.75, "top_k": 2}
    by_weight = router_of_logits(3, drop_policy="probability", **knobs)(probs.log())
    assert by_weight.dispatch_mask[:, 1].tolist() == [True, False]
    by_rank = router_of_logits(3, drop_policy="batch_priority", **knobs)(probs.log())
    assert by_rank.dispatch_mask[:, 1].tolist() == [False, True]


def test_capacity_of_training_and_of_evaluation() -> None:
    x = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 8).double()  # all want experts 0 and 1
    router = router_of_logits(4, capacity_factor=0.5, eval_capacity_factor=1.0, min_capacity=3)

    def load(output: RouterOutput) -> list[int]:
        return output.tokens_per_expert.tolist()

    assert load(router(x)) == [3, 3, 0, 0]  # ceil(.5 * 8 * 2 / 4) = 2, but at least 3
    assert load(router.eval()(x)) == [4, 4, 0, 0]
    router.eval_capacity_factor = None
    assert load(router(x)) == [8, 8, 0, 0]


@pytest.mark.parametrize(
    ("changes", "causal", "causal_training"),
    [
        ({}, True, True),
        ({"capacity_factor": 1.0}, True, False),
        ({"eval_capacity_factor": 1.0}, False, True),
        ({"capacity_factor": 1.0, "top_k": 1}, True, True),
        ({"capacity_factor": 1.0, "top_k": 1, "drop_policy": "batch_priority"}, True, False),
        ({"eval_capacity_factor": 1.0, "top_k": 1, "drop_policy": "probability"}, False, True),
    ],
)
def test_who_looks_ahead(changes: dict[str, Any], causal: bool, causal_training: bool) -> None:
    router = TokenChoice(8, 4, normalize_weights=False, **changes)
    assert (router.causal, router.causal_training) == (causal, causal_training)


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise": True}, ["noise=true", "top_k_first"]),
        ({**NOISY, "balancer": ExpertBias}, ["noise=true", "balancer"]),
        ({"num_groups": 3}, ["num_groups=3", "num_experts=8"]),
        ({"num_groups": 4, "groups_per_token": 5}, ["groups_per_token=5", "at most 4"]),
        ({"num_groups": 4, "top_k": 3}, ["top_k=3", "groups_per_token=1", "2"]),
        ({"num_groups": 8, "top_k": 1, "normalize_weights": False, "balancer": ExpertBias},
         ["num_groups=8", "4"]),
        ({"second_choice_threshold": 0.0}, ["second_choice_threshold=0.0", "above 0"]),
        ({"second_choice_threshold": 0.2, "top_k": 1, "normalize_weights": False},
         ["second_choice_threshold", "top_k=1"]),
        ({"eval_capacity_factor": -1.0}, ["eval_capacity_factor=-1.0", "above 0"]),
        ({"min_capacity": -1}, ["min_capacity=-1", "at least 0"]),
        ({"drop_policy": "random"}, ["drop_policy='random'", "'batch_priority'"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]) as error:
        TokenChoice(8, 8, **changes)
    for word in words:
        assert word in str(error.value)


def test_draws_need_a_context() -> None:
    for changes in (NOISY, {"second_choice_threshold": 0.2}):
        with pytest.raises(ValueError, match="pass a RoutingContext"):
            TokenChoice(8, 8, **changes)(torch.zeros(2, 8))
