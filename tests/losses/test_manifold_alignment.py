"""Manifold alignment on records made by hand; the objective's tests have it train a model."""

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.core.config import compose
from routerlab.core.instantiate import build_all
from routerlab.core.protocols import LayerLoss, RecordsLoss
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.losses.manifold_alignment import ManifoldAlignment
from tests.helpers.records import record

NAMES = [f"layers.{i:02d}.moe" for i in range(3)]
SAMPLES, LENGTH, EXPERTS = 8, 4, 3


def bank(layers: int = 2, **changes: Any) -> SimpleNamespace:
    """Random samples; of the last so many layers."""
    draws = torch.Generator().manual_seed(0)
    routing = torch.randn(SAMPLES, layers, EXPERTS, generator=draws).softmax(-1).flatten(1)
    about: dict[str, Any] = {
        "embeddings": torch.randn(SAMPLES, 5, generator=draws),
        "routing": routing,
        "correct": torch.arange(SAMPLES) % 3 > 0,
        "layers": dict.fromkeys(NAMES[-layers:], EXPERTS),
        "token": "last1",
    }
    return SimpleNamespace(**about | changes)


def records(samples: int, seed: int = 1) -> tuple[list[Tensor], dict[str, RouterOutput]]:
    torch.manual_seed(seed)
    leaves = [torch.randn(samples * LENGTH, EXPERTS, requires_grad=True) for _ in NAMES]
    found = [record(leaf.softmax(-1), leaf.topk(2).indices) for leaf in leaves]
    return leaves, dict(zip(NAMES, found, strict=True))


def context(*samples: int) -> RoutingContext:
    return RoutingContext(len(samples), LENGTH, sample_ids=torch.tensor(samples))


def ready(found: Any = None, **knobs: Any) -> ManifoldAlignment:
    loss = ManifoldAlignment(**{"layers": 2} | knobs)
    loss.use_bank(bank() if found is None else found)
    return loss


def by_hand(vector: Tensor, sample: int, told: SimpleNamespace) -> Tensor:
    """Equation 7 with three nearest successful neighbours and a Gaussian of width 0.4."""
    others = [j for j in range(SAMPLES) if j != sample and told.correct[j]]
    distances = {
        j: (told.embeddings[sample] - told.embeddings[j]).square().sum().double() for j in others
    }
    near = sorted(others, key=lambda j: float(distances[j]))[:3]
    sims = torch.stack([-distances[j] / (2 * 0.4**2) for j in near]).softmax(0)
    pulls = torch.stack([(vector - told.routing[j]).square().sum() for j in near])
    return (sims * pulls).sum()


def test_it_is_a_loss_on_records() -> None:
    loss = ManifoldAlignment()
    assert isinstance(loss, RecordsLoss)
    assert not isinstance(loss, LayerLoss)


def test_the_value_is_a_sum_over_layers_and_neighbours_and_a_mean_over_samples() -> None:
    told, (_, found) = bank(), records(3)
    value = ready().of_records(found, context(4, 0, 7))
    vectors = [
        torch.cat([found[name].router_probs[LENGTH * (row + 1) - 1] for name in NAMES[1:]])
        for row in range(3)
    ]
    expected = [by_hand(vectors[row], sample, told) for row, sample in enumerate((4, 0, 7))]
    torch.testing.assert_close(value.double(), torch.stack(expected).mean(), rtol=1e-5, atol=0)


def test_the_gradient_reaches_the_layers_it_names_and_no_other() -> None:
    leaves, found = records(2)
    told = bank()
    ready(told).of_records(found, context(1, 2)).backward()
    assert leaves[0].grad is None
    for leaf in leaves[1:]:
        at = leaf.grad.view(2, LENGTH, EXPERTS)
        assert at[:, -1].ne(0).all()
        assert at[:, :-1].eq(0).all()
    assert told.routing.grad is None
    assert told.embeddings.grad is None


def test_shares_of_micro_batches_add_up() -> None:
    _, found = records(4)
    loss, whole = ready(), context(1, 5, -1, 3)
    totals = StepTotals(torch.tensor(16.0), torch.tensor(4.0))
    expected = loss.of_records(found, whole, totals)
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        rows = slice(half.start * LENGTH, half.stop * LENGTH)
        piece = {
            name: record(one.router_probs[rows], one.router_probs[rows].topk(2).indices)
            for name, one in found.items()
        }
        told = context(*whole.sample_ids[half].tolist())
        parts.append(loss.of_records(piece, told, totals))
    torch.testing.assert_close(sum(parts), expected)
    torch.testing.assert_close(expected, loss.of_records(found, whole))


def test_samples_outside_the_bank_count_nothing_but_are_counted() -> None:
    _, found = records(2)
    loss = ready()
    both = loss.of_records(found, context(6, -1))
    assert loss.of_records(found, context(-1, -1)) == 0
    halved = StepTotals(torch.tensor(8.0), torch.tensor(4.0))
    torch.testing.assert_close(loss.of_records(found, context(6, -1), halved), both / 2)


def test_disjoint_routing_in_five_layers_is_ten() -> None:
    names = [f"layers.{i:02d}.moe" for i in range(5)]
    routing = torch.tensor([1.0, 0.0] * 5).expand(4, 10)
    told = bank(embeddings=torch.randn(4, 3), correct=torch.ones(4).bool())
    told.layers, told.routing = dict.fromkeys(names, 2), routing.clone()
    loss = ManifoldAlignment()
    loss.use_bank(told)
    other = record([[0.0, 1.0]], [[1]])
    context = RoutingContext(1, 1, sample_ids=torch.tensor([2]))
    assert float(loss.of_records(dict.fromkeys(names, other), context)) == pytest.approx(10)
    same = record([[1.0, 0.0]], [[0]])
    assert float(loss.of_records(dict.fromkeys(names, same), context)) == pytest.approx(0, abs=1e-6)


def test_what_a_wrong_sample_did_changes_nothing() -> None:
    _, found = records(4)
    told = bank()
    routing = told.routing.clone()
    routing[~told.correct] = torch.rand_like(routing[~told.correct])
    other = bank(routing=routing)
    values = [ready(one).of_records(found, context(0, 1, 3, 4)) for one in (told, other)]
    assert torch.equal(*values)


def test_no_successful_sample_warns_once_and_leaves_the_task_alone() -> None:
    leaves, found = records(2)
    with pytest.warns(UserWarning, match="none of the 8 samples rightly"):
        loss = ready(bank(correct=torch.zeros(SAMPLES).bool()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = loss.of_records(found, context(0, 1))
    assert value == 0
    value.backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves)


def test_random_neighbours_depend_on_the_seed_alone() -> None:
    _, found = records(2)
    values = []
    for seed in (0, 0, 1):
        loss = ManifoldAlignment(layers=2, neighbours="random")
        loss.use_bank(bank(), seed)
        values.append(loss.of_records(found, context(0, 1)).item())
    assert values[0] == values[1] != values[2]


def test_other_tokens_are_aligned_with_their_own_bank() -> None:
    _, found = records(2)
    with pytest.raises(ValueError, match="token='first1': the bank holds 'last1'"):
        ready(token="first1")
    loss = ready(bank(token="first1"), token="first1")
    assert loss.of_records(found, context(0, 1)) != ready().of_records(found, context(0, 1))


def test_config() -> None:
    cfg = compose("loss=[manifold_alignment]", "loss.manifold_alignment.layers=[0,2]")
    loss = build_all(cfg.loss)["manifold_alignment"]
    assert (loss.weight, loss.layers, loss.token) == (0.8, [0, 2], "last1")
    rule = loss.neighbourhood
    assert (rule.kind, rule.k, rule.sigma, rule.kernel) == ("knn", 3, 0.4, "gaussian")


def test_mistakes_are_named() -> None:
    _, found = records(2)
    loss = ManifoldAlignment(layers=2)
    assert loss.of_records(found, context(-1, -1)) == 0  # a rehearsal needs no bank
    with pytest.raises(ValueError, match="has no bank of neighbours; call use_bank"):
        loss.of_records(found, context(0, 1))
    with pytest.raises(ValueError, match="needs the numbers of the samples.*routing_alignment"):
        ready().of_records(found, RoutingContext(2, LENGTH))
    with pytest.raises(ValueError, match="does not go with routers that sample"):
        ready().of_records(found, replace(context(0, 1), num_replicas=2))
    with pytest.raises(ValueError, match="layers=4: must be from 1 to the 3"):
        ready(layers=4).of_records(found, context(0, 1))
    with pytest.raises(ValueError, match=r"layers=3: are layers.00.moe, .*; the bank holds layer"):
        ready(layers=3).of_records(found, context(0, 1))
    with pytest.raises(ValueError, match="weight=-1: must be at least 0"):
        ManifoldAlignment(weight=-1)
    with pytest.raises(ValueError, match="token='last2': must be one of"):
        ManifoldAlignment(token="last2")
