"""Loss-free balancing by hand."""

import pytest
import torch

from routerlab.balancers.expert_bias import ExpertBias
from routerlab.core.protocols import Balancer

COUNTS = torch.tensor([10, 2, 4, 4])  # mean 5: e = [-5, 3, 1, 1]


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, [-1e-3, 1e-3, 1e-3, 1e-3]),
        ({"zero_mean": True}, [-1.5e-3, 0.5e-3, 0.5e-3, 0.5e-3]),
        ({"rule": "proportional"}, [-1e-3, 0.6e-3, 0.2e-3, 0.2e-3]),
        ({"rate": 0.0}, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_update_by_hand(knobs: dict, expected: list[float]) -> None:
    balancer = ExpertBias(4, **knobs)
    balancer.update(COUNTS, balancer.bias)
    torch.testing.assert_close(balancer.bias, torch.tensor(expected), atol=1e-9, rtol=1e-5)
    balancer.update(torch.tensor([7, 7, 7, 7]), balancer.bias)  # sign(0) = 0
    torch.testing.assert_close(balancer.bias, torch.tensor(expected), atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_a_step_without_tokens_changes_nothing(rule: str) -> None:
    balancer = ExpertBias(4, rule=rule)
    balancer.update(torch.zeros(4, dtype=torch.long), balancer.bias)
    assert not balancer.bias.any()


def test_it_balances_a_skewed_router_over_steps() -> None:
    torch.manual_seed(0)
    balancer, skew = ExpertBias(8, rate=0.01), torch.arange(8) / 4
    violations = []
    for _ in range(300):
        scores = (torch.randn(512, 8) + skew).sigmoid()
        bias, proposal = balancer(scores, 2)
        picks = (scores + bias).topk(2).indices.flatten()
        counts = torch.bincount(picks, minlength=8)
        violations.append((counts.max() / counts.float().mean() - 1).item())
        balancer.update(counts, proposal)
    assert violations[0] > 1
    assert sum(violations[-20:]) / 20 < 0.2


def test_contract() -> None:
    balancer = ExpertBias(4)
    assert isinstance(balancer, Balancer)
    assert balancer.causal_training
    assert balancer.state_dict()["bias"].dtype == torch.float32
    assert list(balancer.parameters()) == []
    for rate in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"rate=.*at least 0"):
            ExpertBias(4, rate=rate)
    with pytest.raises(ValueError, match="rule='mean'.*'sign', 'proportional'"):
        ExpertBias(4, rule="mean")
