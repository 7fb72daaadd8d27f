"""Random routing: uniform, distinct, and a function of the seed."""

import pytest
import torch

from routerlab.core.protocols import Router
from routerlab.core.routing import RoutingContext
from routerlab.routers.random import RandomRouter


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_the_record(training: bool, top_k: int) -> None:
    router = RandomRouter(8, 6, top_k).train(training)
    assert isinstance(router, Router)
    assert router.order_dependent
    assert not list(router.parameters())
    output = router(torch.randn(50, 8), RoutingContext(1, 50))
    assert output.top_k == router.top_k == top_k
    assert (output.dispatch_mask.sum(-1) == top_k).all()
    assert output.combine_weights.tolist() == pytest.approx([1 / top_k] * 50 * top_k)
    torch.testing.assert_close(output.router_probs, torch.full((50, 6), 1 / 6))
    assert not output.router_logits.any()


def test_pairs_are_uniform() -> None:
    # 20 ordered pairs of 5 experts: 2000 each of 40000, standard deviation 43.6
    picks = RandomRouter(2, 5)(torch.zeros(40_000, 2), RoutingContext(1, 40_000)).expert_indices
    first, second = picks.view(-1, 2).T
    counts = torch.bincount(first * 5 + second, minlength=25).view(5, 5)
    assert not counts.diagonal().any()
    assert ((counts[~torch.eye(5, dtype=torch.bool)] - 2000).abs() < 218).all()


def test_draws_are_a_function_of_seed_and_layer_and_not_of_the_tokens() -> None:
    router = RandomRouter(8, 6)
    picks = [
        router(torch.randn(30, 8), RoutingContext(1, 30, seed=seed, layer=layer)).expert_indices
        for seed, layer in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], picks[2])
    assert not torch.equal(picks[0], picks[3])


def test_padding_picks_nothing() -> None:
    valid = torch.tensor([True, False, True])
    output = RandomRouter(8, 6)(torch.randn(3, 8), RoutingContext(1, 3, valid=valid))
    assert output.token_indices.tolist() == [0, 0, 2, 2]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="RoutingContext"):
        RandomRouter(8, 6)(torch.randn(3, 8))
    with pytest.raises(ValueError, match="top_k=7: must be at least 1 and at most 6"):
        RandomRouter(8, 6, top_k=7)
