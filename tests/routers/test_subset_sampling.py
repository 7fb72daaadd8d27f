"""Subset sampling: constant weights, draws by their law, and gradients by log-probability alone."""

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch

from routerlab.core.protocols import Router
from routerlab.core.routing import RoutingContext
from routerlab.ops.plackett_luce import ordered_log_prob
from routerlab.ops.selection import effective_support_size
from routerlab.routers.subset_sampling import SubsetSampling
from tests.routers.laws import (
    assert_finite,
    assert_padding_is_nothing,
    assert_tokens_permute,
    dense_weights,
    of_logits,
)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("weight", "expected"), [(None, 1 / 3), (0.353553, 0.353553)])
def test_weights_are_constant(training: bool, weight: float | None, expected: float) -> None:
    router = SubsetSampling(8, 6, top_k=3, weight=weight, init_std=2.0).train(training)
    assert isinstance(router, Router)
    assert router.causal
    assert router.samples
    output = router(torch.randn(20, 8), RoutingContext(2, 10))
    assert output.top_k == router.top_k == 3
    assert output.combine_weights.tolist() == pytest.approx([expected] * 60)
    assert not output.combine_weights.requires_grad
    assert (output.dispatch_mask.sum(-1) == 3).all()  # distinct
    support = effective_support_size(dense_weights(output))
    torch.testing.assert_close(support, torch.full((20,), 3.0))  # never collapses


def test_evaluation_takes_the_most_probable_and_draws_nothing() -> None:
    router = SubsetSampling(8, 6, top_k=2, init_std=1.0).eval()
    x = torch.randn(20, 8)
    output, again = router(x), router(x, RoutingContext(1, 20, seed=5))
    assert torch.equal(output.expert_indices, again.expert_indices)
    best = output.router_logits.topk(2).indices
    assert torch.equal(output.expert_indices.view(20, 2), best)
    assert output.log_prob is None


def test_training_draws_by_the_law() -> None:
    # q = (.5, .3, .2): Q(0,1) = .3, Q(1,0) = .214286, ...; 4 standard deviations are .006
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    router = of_logits(SubsetSampling(3, 3))
    output = router(q.log().expand(100_000, 3), RoutingContext(1, 100_000))
    picks = output.expert_indices.view(-1, 2)
    for i, j in permutations(range(3), 2):
        chance = float(q[i] * q[j] / (1 - q[i]))
        drawn = (picks == torch.tensor([i, j])).all(-1)
        assert drawn.double().mean().item() == pytest.approx(chance, abs=0.01)
        log_prob = output.log_prob[drawn]
        torch.testing.assert_close(log_prob.exp(), torch.full_like(log_prob, chance))


def test_draws_are_a_function_of_seed_and_layer() -> None:
    router, x = SubsetSampling(8, 6), torch.randn(30, 8)
    picks = [
        router(x, RoutingContext(1, 30, seed=seed, layer=layer)).expert_indices
        for seed, layer in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert torch.equal(picks[0], picks[1])  # as when a forward pass is recomputed
    assert not torch.equal(picks[0], picks[2])
    assert not torch.equal(picks[0], picks[3])


def test_sampling_needs_a_context() -> None:
    with pytest.raises(ValueError, match="RoutingContext"):
        SubsetSampling(8, 4)(torch.randn(3, 8))


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_the_gate_learns_by_log_prob_alone_and_tokens_get_nothing(granularity: str) -> None:
    router = SubsetSampling(8, 4, granularity=granularity)
    x = torch.randn(6, 8, requires_grad=True)
    output = router(x, RoutingContext(2, 3))
    (x.sum() + output.log_prob.sum()).backward()
    assert router.gate.weight.grad.abs().sum() > 0
    assert torch.equal(x.grad, torch.ones_like(x))  # of x.sum(): exactly 0 from the choice
    gradient = router.gate.weight.grad.clone()
    router.gate.weight.grad = None
    picks = output.expert_indices.view(6, 2)
    logits = router.gate(x.detach())
    if granularity == "sequence":
        picks, logits = picks[::3], router.gate(x.detach().view(2, 3, 8).mean(1))
    ordered_log_prob(logits, picks).sum().backward()
    torch.testing.assert_close(router.gate.weight.grad, gradient)


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    router, logits = of_logits(SubsetSampling(5, 5)), torch.randn(40, 5, dtype=torch.float64)
    plain, moved = (router(z, RoutingContext(1, 40)) for z in (logits, logits + 3.0))
    assert torch.equal(plain.expert_indices, moved.expert_indices)
    torch.testing.assert_close(plain.log_prob, moved.log_prob)


def test_padding_has_no_log_prob_and_does_not_touch_the_rest() -> None:
    router, valid = SubsetSampling(8, 4), torch.tensor([True, False, True, True, True, False])
    x = torch.randn(6, 8)
    output = router(x, RoutingContext(2, 3, valid=valid))
    assert (output.log_prob[~valid] == 0).all()
    assert (output.log_prob[valid] < 0).all()
    other = torch.where(valid[:, None], x, 100.0)
    again = router(other, RoutingContext(2, 3, valid=valid))
    assert torch.equal(again.expert_indices, output.expert_indices)
    torch.testing.assert_close(again.log_prob, output.log_prob)


# -- one draw a sequence --------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_sequence_shares_its_experts(training: bool) -> None:
    router = SubsetSampling(8, 6, granularity="sequence", init_std=2.0).train(training)
    assert not router.causal
    valid = torch.tensor([False, True, True, True, True, False, False, False, False])
    x = torch.randn(9, 8)
    output = router(x, RoutingContext(3, 3, valid=valid))
    assert output.token_indices.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    picks = output.expert_indices.view(4, 2)
    assert torch.equal(picks[0], picks[1])
    assert torch.equal(picks[2], picks[3])
    means = torch.stack([x[1:3].mean(0), x[3:5].mean(0), torch.zeros(8)])
    torch.testing.assert_close(output.router_logits[::3], router.gate(means))
    if not training:
        assert torch.equal(
            picks[::2].sort(-1).values, router.gate(means[:2]).topk(2).indices.sort(-1).values
        )
        return
    # one term a sequence, at its first real token: reward-to-go then counts all its losses
    assert (output.log_prob != 0).nonzero().flatten().tolist() == [1, 3]
    expected = ordered_log_prob(router.gate(means[:2]), picks[::2])
    torch.testing.assert_close(output.log_prob[[1, 3]], expected)


def test_sequences_draw_for_themselves() -> None:
    router = SubsetSampling(8, 6, granularity="sequence")
    picks = router(torch.zeros(80, 8), RoutingContext(40, 2)).expert_indices.view(40, 2, 2)
    assert torch.equal(picks[:, 0], picks[:, 1])
    assert len(picks[:, 0].unique(dim=0)) > 10


def test_a_told_prompt_is_all_that_is_read() -> None:
    router = SubsetSampling(8, 6, granularity="sequence").eval()
    assert router.reads_prompt_only
    assert not SubsetSampling(8, 6).reads_prompt_only
    valid = torch.tensor([False, True, True, True, True, True, True, True])
    prompt = torch.tensor([False, True, True, False, True, False, False, False])
    x = torch.randn(8, 8)
    output = router(x, RoutingContext(2, 4, valid=valid, prompt=prompt))
    means = torch.stack([x[1:3].mean(0), x[4]])
    torch.testing.assert_close(output.router_logits[::4], router.gate(means))
    other = torch.where(prompt[:, None], x, 9.0)  # other answers
    again = router(other, RoutingContext(2, 4, valid=valid, prompt=prompt))
    assert torch.equal(again.expert_indices, output.expert_indices)
    assert output.token_indices.unique().tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_an_embedding_of_the_sequence_is_taken_instead() -> None:
    router, embedding = SubsetSampling(8, 6, granularity="sequence").eval(), torch.randn(2, 8)
    context = RoutingContext(2, 3, sequence_embedding=embedding.requires_grad_())
    output = router(torch.randn(6, 8), context)
    torch.testing.assert_close(output.router_logits[::3], router.gate(embedding))
    output.router_logits.sum().backward()
    assert embedding.grad is None  # detached, as tokens are


# -- samples of the same input --------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_blocks_draw_as_single_replicas_do(granularity: str) -> None:
    router = SubsetSampling(8, 6, granularity=granularity)
    x, one = torch.randn(6, 8), RoutingContext(2, 3, seed=4, layer=1)
    alone = [router(x, replace(one, replica=m)) for m in (1, 2, 3)]
    blocks = router(x.repeat(3, 1), replace(one, batch_size=6, replica=1, num_replicas=3))
    for name in ("expert_indices", "log_prob"):
        apart = torch.cat([getattr(output, name) for output in alone])
        assert torch.equal(getattr(blocks, name), apart)
    assert not torch.equal(alone[0].expert_indices, alone[1].expert_indices)


def test_the_gate_has_its_graph_where_gradients_are_off() -> None:
    router, x, context = SubsetSampling(8, 4), torch.randn(6, 8), RoutingContext(2, 3)
    with torch.no_grad():
        output = router(x, context)
        plain = router.eval()(x, context)
    assert output.log_prob.requires_grad
    assert not output.combine_weights.requires_grad
    assert not plain.router_logits.requires_grad  # evaluation builds none
    output.log_prob.sum().backward()
    assert router.gate.weight.grad.any()
    with torch.inference_mode():
        output = router.train()(x, context)
    assert output.log_prob.is_inference()


# -- laws -----------------------------------------------------------------------------------------


def test_laws() -> None:
    assert_tokens_permute(SubsetSampling(8, 6, init_std=0.5))
    assert_padding_is_nothing(SubsetSampling(8, 6, init_std=0.5))
    for top_k in (1, 2, 6):
        assert_finite(SubsetSampling(6, 6, top_k=top_k))
    assert_finite(SubsetSampling(6, 6, granularity="sequence"))


def test_renumbering_experts_renumbers_the_choice() -> None:
    router, order = SubsetSampling(8, 5).eval(), torch.randperm(5)
    other = SubsetSampling(8, 5).eval()
    other.gate.weight.data = router.gate.weight.data[order]
    x = torch.randn(10, 8)
    assert torch.equal(other(x).dispatch_mask, router(x).dispatch_mask[:, order])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 0}, ["top_k=0", "at least 1", "at most 4"]),
        ({"top_k": 5}, ["top_k=5", "at least 1", "at most 4"]),
        ({"weight": 0.0}, ["weight=0.0", "above 0"]),
        ({"granularity": "batch"}, ["granularity='batch'", "'token'", "'sequence'"]),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        SubsetSampling(8, 4, **changes)
    for word in words:
        assert word in str(error.value)
