"""Hash routing: experts are a fixed function of the vocabulary id."""

import pytest
import torch
from torch import Tensor

from routerlab.core.protocols import Router
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.hash import HashRouter


def route(
    ids: Tensor, top_k: int = 2, num_experts: int = 8, seed: int = 0, layer: int = 0
) -> RouterOutput:
    router = HashRouter(4, num_experts, top_k, seed)
    context = RoutingContext(1, len(ids), token_ids=ids, layer=layer)
    return router(torch.randn(len(ids), 4), context)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_the_record(top_k: int) -> None:
    assert isinstance(HashRouter(4, 8), Router)
    assert not list(HashRouter(4, 8).parameters())
    output = route(torch.randint(1000, (50,)), top_k)
    assert output.top_k == top_k
    assert (output.dispatch_mask.sum(-1) == top_k).all()  # distinct
    assert output.combine_weights.tolist() == pytest.approx([1 / top_k] * 50 * top_k)
    torch.testing.assert_close(output.router_probs, output.dispatch_mask / top_k)
    assert not output.router_logits.any()
    assert not output.combine_weights.requires_grad


def test_equal_ids_have_equal_experts_wherever_they_are() -> None:
    ids = torch.tensor([5, 9, 5, 123_456, 9, 5])
    picks = route(ids).expert_indices.view(6, 2)
    for i in range(6):
        for j in range(6):
            if ids[i] == ids[j]:
                assert torch.equal(picks[i], picks[j])
    order = torch.randperm(6)
    assert torch.equal(route(ids[order]).expert_indices.view(6, 2), picks[order])
    assert torch.equal(route(ids, top_k=1).expert_indices, picks[:, 0])  # K only adds


def test_a_known_hash() -> None:
    # pinned: runs of one version and the next are to be comparable
    picks = route(torch.arange(6)).expert_indices.view(6, 2).tolist()
    assert picks == [[1, 6], [1, 7], [3, 6], [6, 5], [5, 4], [7, 5]]


def test_seeds_and_layers_have_hashes_of_their_own() -> None:
    # independent choices of 1 of 8 agree for 1/8 of ids: 512 +- 4 * 21 of 4096
    ids = torch.arange(4096)
    plain = route(ids, top_k=1).expert_indices
    for other in (route(ids, 1, seed=1), route(ids, 1, layer=1), route(ids, 1, layer=2)):
        agree = int((other.expert_indices == plain).sum())
        assert 428 < agree < 596
    assert torch.equal(route(ids, top_k=1).expert_indices, plain)


@pytest.mark.parametrize("stride", [1, 8, 4096])
@pytest.mark.parametrize("num_experts", [3, 8])
def test_ids_spread_evenly(stride: int, num_experts: int) -> None:
    # also pairs of experts: no pair is rarer or more frequent than 5 standard deviations allow
    num_ids = 8000
    ids = torch.arange(num_ids) * stride
    output = route(ids, 2, num_experts)
    pairs = output.expert_indices.view(-1, 2)
    cell = pairs[:, 0] * num_experts + pairs[:, 1]
    counts = torch.bincount(cell, minlength=num_experts**2).view(num_experts, num_experts)
    assert not counts.diagonal().any()
    chance = 1 / (num_experts * (num_experts - 1))
    expected, spread = num_ids * chance, (num_ids * chance * (1 - chance)) ** 0.5
    off = counts[~torch.eye(num_experts, dtype=torch.bool)]
    assert ((off - expected).abs() < 5 * spread).all()


def test_padding_is_nothing() -> None:
    ids, valid = torch.tensor([3, 0, 7, 0]), torch.tensor([True, False, True, False])
    context = RoutingContext(2, 2, token_ids=ids, valid=valid)
    output = HashRouter(4, 8)(torch.randn(4, 4), context)
    assert output.token_indices.tolist() == [0, 0, 2, 2]
    assert torch.equal(output.expert_indices, route(ids[valid]).expert_indices)
    torch.testing.assert_close(output.router_probs.sum(-1), torch.ones(4))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="token_ids"):
        HashRouter(4, 8)(torch.randn(3, 4))
    with pytest.raises(ValueError, match="token_ids"):
        HashRouter(4, 8)(torch.randn(3, 4), RoutingContext(1, 3))
    with pytest.raises(ValueError, match="top_k=9: must be at least 1 and at most 8"):
        HashRouter(4, 8, top_k=9)
