"""The load-balancing loss by hand, and traps that implementations fall into."""

from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.losses.load_balancing import LoadBalancingLoss
from tests.helpers.records import EX_A_PICKS, EX_A_PROBS, ex_a, random_record, record

SCOPES = ["micro_batch", "sequence", "global"]


def loss_of(probs: Any, picks: Any, scope: str = "global", **of_record: Any) -> float:
    return float(LoadBalancingLoss(scope=scope)(record(probs, picks, **of_record)))


def totals_of(records: list[RouterOutput]) -> StepTotals:
    """One step of several micro-batches, one sequence each, without padding."""
    return StepTotals(
        torch.tensor(float(sum(len(r.router_logits) for r in records))),
        torch.tensor(float(len(records))),
        torch.stack([r.requests_per_expert for r in records]).sum(0).double(),
    )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_one_at_balance_for_every_k_and_any_probabilities(scope: str, top_k: int) -> None:
    # token t picks experts t, t+1, ... t+K-1: E sum_i (1/E) P_i = sum_i P_i = 1
    picks = (torch.arange(4)[:, None] + torch.arange(top_k)) % 4
    probs = torch.rand(4, 4, dtype=torch.float64).softmax(-1)
    assert loss_of(probs, picks, scope) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("scope", SCOPES)
def test_one_for_a_uniform_router_whatever_it_picks(scope: str) -> None:
    probs = torch.full((4, 4), 0.25, dtype=torch.float64)  # sum_i f_i * 4 * 1/4 = 1
    assert loss_of(probs, [[0, 1]] * 4, scope) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("top_k", [1, 2])
def test_collapse_is_e_over_k(top_k: int) -> None:
    # all mass and all picks on K experts: f = P = 1/K there, E * K * 1/K^2 = E/K
    probs = torch.zeros(5, 4, dtype=torch.float64)
    probs[:, :top_k] = 1 / top_k
    assert loss_of(probs, [list(range(top_k))] * 5) == pytest.approx(4 / top_k)


def test_value_and_gradient_by_hand() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], dtype=torch.float64)
    probs.requires_grad_()
    picks = torch.tensor([[0], [0], [0], [1]])
    output = RouterOutput.from_top_k(probs.log(), probs, picks, probs.gather(1, picks))
    value = LoadBalancingLoss()(output)
    value.backward()
    assert value.item() == pytest.approx(1.15)  # 2 (.75 * .65 + .25 * .35)
    # dL/dp = E f_i / T = 2 * [.75, .25] / 4: the counts carry no gradient
    torch.testing.assert_close(
        probs.grad, torch.tensor([[0.375, 0.125]], dtype=torch.float64).expand(4, 2)
    )


def test_running_example_of_the_metrics_card() -> None:
    # E sum f P = 4 (.375 * .375 + .25 * .2 + .25 * .2 + .125 * .225) = 1.075
    assert float(LoadBalancingLoss()(ex_a())) == pytest.approx(1.075)


def test_two_collapsed_layers_do_not_look_balanced() -> None:
    layers = [
        loss_of([[0.99, 0.01]] * 4, [[0]] * 4),
        loss_of([[0.01, 0.99]] * 4, [[1]] * 4),
    ]
    assert sum(layers) / 2 == pytest.approx(1.98)  # 2 * 1 * .99 each; pooled it would be 1.0


def test_four_layers_collapsed_on_four_experts_score_four() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    layers = [loss_of(eye[[e] * 6], [[e]] * 6) for e in range(4)]
    assert layers == pytest.approx([4.0] * 4)


def test_second_picks_on_one_expert_raise_the_loss() -> None:
    # first picks are even over experts 0-3; second picks go round, or all to expert 4
    first = torch.arange(8)[:, None] % 4
    probs = torch.full((8, 8), 0.02, dtype=torch.float64)
    even = torch.cat([first, 4 + first], dim=1)
    collapsed = torch.cat([first, torch.full_like(first, 4)], dim=1)
    values = []
    for picks in (even, collapsed):
        p = probs.scatter(1, picks, 0.44)  # rows: 6 * .02 + 2 * .44 = 1
        values.append(loss_of(p, picks))
    # even: f = P = 1/8 -> 1; collapsed: f = [1/8]*4 + [1/2] + [0]*3 and
    # P = [.125]*4 + [.44] + [.02]*3: 8 (4/64 + .22) = 2.26
    assert values == pytest.approx([1.0, 2.26])


def test_micro_batches_and_the_step() -> None:
    parts = [record([[0.9, 0.1]] * 4, [[0]] * 4), record([[0.1, 0.9]] * 4, [[1]] * 4)]
    totals = totals_of(parts)
    values = {}
    for scope in ("micro_batch", "global"):
        loss = LoadBalancingLoss(scope=scope)
        values[scope] = sum(float(loss(part, None, totals)) for part in parts)
    assert values == pytest.approx({"micro_batch": 1.8, "global": 1.0})  # mean of 1.8 and 1.8


def test_micro_batches_weigh_by_tokens() -> None:
    # 3 tokens of loss 1.8 and 1 token of loss 2 * .6 = 1.2: (3 * 1.8 + 1.2) / 4 = 1.65
    parts = [record([[0.9, 0.1]] * 3, [[0]] * 3), record([[0.4, 0.6]], [[1]])]
    loss = LoadBalancingLoss(scope="micro_batch")
    assert sum(float(loss(p, None, totals_of(parts))) for p in parts) == pytest.approx(1.65)


def test_sequence_loss_by_hand() -> None:
    scores = torch.tensor([[0.8, 0.6, 0.2, 0.4], [0.9, 0.3, 0.6, 0.2]], dtype=torch.float64)
    probs = scores / scores.sum(-1, keepdim=True)
    picks = scores.topk(2).indices  # {0, 1}, {0, 2}
    # f = [2,1,1,0], P = [.425,.225,.2,.15]: .85 + .225 + .2 = 1.275
    assert loss_of(probs, picks, "sequence") == pytest.approx(1.275)


def test_sequence_loss_is_the_mean_over_sequences() -> None:
    a, b = random_record(6, 4, 2, seed=1), random_record(6, 4, 2, seed=2)
    both = record(
        torch.cat([a.router_probs, b.router_probs]),
        torch.cat([a.expert_indices, b.expert_indices]).view(12, 2),
    )
    loss, one = LoadBalancingLoss(scope="sequence"), RoutingContext(1, 6)
    mean = (loss(a, one) + loss(b, one)) / 2
    torch.testing.assert_close(loss(both, RoutingContext(2, 6)), mean)
    assert abs(float(mean - LoadBalancingLoss()(both))) > 1e-3  # and not that of the batch


@pytest.mark.parametrize("scope", SCOPES)
def test_one_sequence_is_one_batch(scope: str) -> None:
    output = random_record(6, 4, 2)
    torch.testing.assert_close(
        LoadBalancingLoss(scope=scope)(output, RoutingContext(1, 6)), LoadBalancingLoss()(output)
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_padding_changes_neither_value_nor_gradient(scope: str) -> None:
    logits = torch.randn(10, 4, dtype=torch.float64)
    valid = torch.tensor([True, True, True, False, False] * 2)
    results = []
    for rows in (torch.arange(10), valid.nonzero()[:, 0]):
        z = logits[rows].requires_grad_()
        probs = z.softmax(-1)
        picked = probs.topk(2)
        mask = valid[rows] if len(rows) == 10 else None
        output = RouterOutput.from_top_k(z, probs, picked.indices, picked.values, valid=mask)
        value = LoadBalancingLoss(scope=scope)(output, RoutingContext(2, len(rows) // 2))
        value.backward()
        results.append((value.detach(), z.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][valid], results[1][1])
    assert not results[0][1][~valid].any()


@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_but_padding_is_worth_nothing(scope: str) -> None:
    output = random_record(4, 3, 2, valid=torch.zeros(4, dtype=torch.bool))
    assert float(LoadBalancingLoss(scope=scope)(output, RoutingContext(2, 2))) == 0


def test_an_empty_sequence_is_not_averaged_in() -> None:
    valid = torch.tensor([True, True, True, False, False, False])
    output = random_record(6, 4, 2, valid=valid)
    loss = LoadBalancingLoss(scope="sequence")
    alone = record(output.router_probs[:3], output.expert_indices.view(3, 2))
    torch.testing.assert_close(loss(output, RoutingContext(2, 3)), loss(alone))


@pytest.mark.parametrize("scope", ["micro_batch", "global"])
def test_counts_are_taken_before_capacity_drops(scope: str) -> None:
    kept = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    dropped, full = ex_a(kept), ex_a()
    loss = LoadBalancingLoss(scope=scope)
    torch.testing.assert_close(loss(dropped), loss(full))


@pytest.mark.parametrize("scope", SCOPES)
def test_invariant_to_relabelling_experts(scope: str) -> None:
    output, order = random_record(8, 4, 2), torch.tensor([3, 1, 0, 2])
    place = order.argsort()  # expert e is called place[e] now
    moved = record(output.router_probs[:, order], place[output.expert_indices].view(8, 2))
    loss = LoadBalancingLoss(scope=scope)
    torch.testing.assert_close(loss(moved), loss(output))


@pytest.mark.parametrize("scope", SCOPES)
def test_no_graph_without_gradients(scope: str) -> None:
    with torch.no_grad():
        value = LoadBalancingLoss(scope=scope)(random_record(6, 4, 2))
    assert not value.requires_grad


def test_deepseek_moe_expert_loss_has_the_same_scale() -> None:  # F: L_Exp
    # their f_i = N' / (K' T) sum_t 1[t picks i] holds E inside: sum f_i P_i is our value
    output = random_record(9, 5, 3)
    f = 5 / (3 * 9) * output.requests_per_expert
    expected = (f * output.router_probs.mean(0)).sum()
    torch.testing.assert_close(LoadBalancingLoss()(output), expected)


def test_global_needs_the_counts_of_the_step() -> None:
    totals = StepTotals(torch.tensor(4.0), torch.tensor(1.0))
    assert LoadBalancingLoss(scope="global").needs_step_sums
    with pytest.raises(ValueError, match=r"scope='global' needs totals.sums"):
        LoadBalancingLoss(scope="global")(ex_a(), None, totals)
    for scope in ("micro_batch", "sequence"):
        loss = LoadBalancingLoss(scope=scope)
        assert not loss.needs_step_sums
        assert float(loss(ex_a(), None, totals)) > 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"scope='step'.*'micro_batch', 'sequence', 'global'"):
        LoadBalancingLoss(scope="step")


def shares(records: list[RouterOutput], scope: str) -> Tensor:
    loss, totals = LoadBalancingLoss(scope=scope), totals_of(records)
    return torch.stack([loss(r, RoutingContext(1, 3), totals) for r in records]).sum()


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_shares_add_up_to_the_whole(scope: str) -> None:
    parts = [random_record(3, 4, 2, seed=seed) for seed in range(4)]
    whole = record(
        torch.cat([p.router_probs for p in parts]),
        torch.cat([p.expert_indices for p in parts]).view(12, 2),
    )
    expected = LoadBalancingLoss(scope=scope)(whole, RoutingContext(4, 3))
    torch.testing.assert_close(shares(parts, scope), expected)


def test_first_choices_only() -> None:
    # preferred experts 0, 0, 3, 0: f = [.75, 0, 0, .25]; P = [.375, .2, .2, .225]
    loss = LoadBalancingLoss(counts="first")
    assert float(loss(ex_a())) == pytest.approx(4 * (0.75 * 0.375 + 0.25 * 0.225))
    valid = torch.tensor([True, True, True, False])  # padding prefers nothing
    padded = record(EX_A_PROBS, EX_A_PICKS, valid=valid)
    assert loss.step_sums(padded).tolist() == [2, 0, 0, 1]
    with pytest.raises(ValueError, match="counts='first' goes with scope='global'"):
        LoadBalancingLoss(counts="first", scope="sequence")
    with pytest.raises(ValueError, match="counts='second'.*'all', 'first'"):
        LoadBalancingLoss(counts="second")


def test_mixlora_reports_k_at_balance() -> None:
    # its f sums to K over slots and experts: 2.0, 1.0 and 3.6 there, and 1/K of that here
    crossed = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]
    assert 2 * loss_of(crossed, [[0, 1], [3, 2]]) == pytest.approx(2.0)
    assert 1 * loss_of(crossed, [[0], [3]]) == pytest.approx(1.0)
    assert 2 * loss_of([[0.7, 0.2, 0.06, 0.04]] * 3, [[0, 1]] * 3) == pytest.approx(3.6)


def test_pooling_is_of_the_caller_and_not_of_sequences() -> None:
    pooling = LoadBalancingLoss(pool_layers=True)
    assert pooling.pool_layers
    assert not LoadBalancingLoss().pool_layers
    torch.testing.assert_close(pooling(ex_a()), LoadBalancingLoss()(ex_a()))  # of one record
    with pytest.raises(ValueError, match="pool_layers=True goes with scope='global'"):
        LoadBalancingLoss(scope="sequence", pool_layers=True)
