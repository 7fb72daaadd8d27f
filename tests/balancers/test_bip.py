"""BIP as a balancer: who sees which tokens, what is kept, what padding does."""

import pytest
import torch
from torch import Tensor

from routerlab.balancers.bip import BIP
from routerlab.core.protocols import Balancer
from routerlab.core.routing import RoutingContext


def scores(seed: int = 0, tokens: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, 8, generator=generator) + torch.arange(8) / 3).softmax(-1)


def violation(s: Tensor, bias: Tensor) -> float:
    counts = torch.bincount((s + bias).topk(2).indices.flatten(), minlength=8).float()
    return (counts.max() / counts.mean() - 1).item()


def test_batch_mode_balances_the_batch_that_it_sees() -> None:
    balancer, s = BIP(8, iterations=8), scores()
    bias, proposal = balancer(s, 2)
    assert violation(s, bias) < 0.1 < violation(s, torch.zeros(8))
    assert torch.equal(bias, -proposal)
    assert not balancer.prices.any()  # a forward pass keeps nothing


def test_causal_mode_routes_with_the_prices_of_the_step_before() -> None:
    balancer = BIP(8, mode="causal", iterations=8)
    first, proposal = balancer(scores(0), 2)
    assert not first.any()
    balancer.update(torch.zeros(8, dtype=torch.long), proposal)
    later, _ = balancer(scores(1), 2)
    assert torch.equal(later, -proposal)
    other, _ = balancer(scores(2), 2)
    assert torch.equal(later, other)  # whatever the batch
    assert violation(scores(1), later) < 0.3


def test_evaluation_uses_the_kept_prices_and_solves_nothing() -> None:
    balancer = BIP(8)
    balancer.update(torch.zeros(8, dtype=torch.long), torch.arange(8.0))
    bias, proposal = balancer.eval()(scores(), 2)
    assert bias.tolist() == [-i for i in range(8)]
    assert torch.equal(proposal, balancer.prices)


def test_warm_start_begins_with_the_kept_prices() -> None:
    cold, warm = BIP(8, iterations=1, warm_start=False), BIP(8, iterations=1)
    found = []
    for balancer in (cold, warm):
        for seed in range(5):
            _, proposal = balancer(scores(seed), 2)
            balancer.update(torch.zeros(8, dtype=torch.long), proposal)
        found.append(violation(scores(9), balancer(scores(9), 2)[0]))
    assert found[1] < found[0] / 2


@pytest.mark.parametrize("mode", ["batch", "causal", "online"])
def test_padding_has_no_say(mode: str) -> None:
    s = scores(tokens=40)
    valid = torch.ones(40, dtype=torch.bool)
    valid[25:] = False
    balancer = BIP(8, mode=mode, iterations=1)
    bias, proposal = balancer(s, 2, RoutingContext(1, 40, valid=valid))
    alone, expected = balancer(s[:25], 2)
    assert torch.equal(proposal, expected)
    assert torch.equal(bias if bias.ndim == 1 else bias[:25], alone)
    nobody = RoutingContext(1, 40, valid=torch.zeros(40, dtype=torch.bool))
    assert torch.isfinite(balancer(s, 2, nobody)[0]).all()


def test_contract_and_mistakes() -> None:
    assert isinstance(BIP(8), Balancer)
    assert not BIP(8).causal_training
    assert BIP(8, mode="online", iterations=1).causal_training
    for knobs, words in (
        ({"iterations": 0}, "iterations=0: must be at least 1"),
        ({"mode": "late"}, "mode='late': must be one of 'batch', 'causal', 'online'"),
        ({"subsample": 0}, "subsample=0: must be at least 1"),
        ({"mode": "online"}, "mode='online' takes tokens one by one"),
    ):
        with pytest.raises(ValueError, match=words):
            BIP(8, **knobs)
