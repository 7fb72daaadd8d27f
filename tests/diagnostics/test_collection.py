"""Sums first, values after the reduction (ranks are not averaged)."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.diagnostics.collection import DiagnosticSums, Values, flatten
from routerlab.diagnostics.expert_load import ExpertLoad
from routerlab.diagnostics.router_entropy import RouterEntropy
from tests.helpers.models import all_diagnostics
from tests.helpers.records import ex_a, random_record, record


def collect(records: Sequence[RouterOutput], context: RoutingContext | None = None) -> Values:
    sums = DiagnosticSums(all_diagnostics())
    for output in records:
        sums.add({"layers.00.moe": output}, context)
    return sums.values()


def of_counts(counts: list[int]) -> RouterOutput:
    picks = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None]
    return record(torch.full((len(picks), len(counts)), 1 / len(counts)), picks)


def one(records: Sequence[RouterOutput], name: str) -> float:
    return collect(records)["layers.00.moe"][name].item()


@pytest.mark.parametrize(
    ("first", "second", "each"), [([3, 1], [1, 3], 0.5), ([4, 0], [0, 4], 1.0)]
)
def test_violation_of_the_whole_is_not_the_mean(
    first: list[int], second: list[int], each: float
) -> None:
    a, b = of_counts(first), of_counts(second)
    assert one([a], "max_violation") == one([b], "max_violation") == each
    assert one([a, b], "max_violation") == 0


def test_entropy_of_the_whole_is_not_the_mean() -> None:
    a, b = record([[0.9, 0.1]], [[0]]), record([[0.1, 0.9]], [[1]])
    # in nats .325083 each and .693147 together; divided by ln 2 = .693147
    assert one([a], "entropy_of_mean") == pytest.approx(0.325083 / 0.693147, abs=2e-6)
    assert one([a, b], "entropy_of_mean") == pytest.approx(1)


def test_parts_equal_the_whole_for_every_diagnostic() -> None:
    parts = [random_record(6, 4, 2, seed=seed) for seed in range(3)]
    whole = record(
        torch.cat([p.router_probs for p in parts]),
        torch.cat([p.expert_indices for p in parts]).view(18, 2),
    )
    domain_ids = torch.tensor([0, 1])
    got = collect(parts, RoutingContext(2, 3, domain_ids=domain_ids, num_domains=2))
    expected = collect(
        [whole], RoutingContext(6, 3, domain_ids=domain_ids.repeat(3), num_domains=2)
    )
    assert len(expected["layers.00.moe"]) == 16  # 8 + 3 + 2 + 1 + 2
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_ranks_equal_the_whole_with_one_reduction() -> None:
    a, b = random_record(5, 4, 2, seed=1), random_record(3, 4, 2, seed=2)
    flats: list[Tensor] = []

    def remember(flat: Tensor) -> Tensor:
        flats.append(flat.clone())
        return flat

    for output in (a, b):
        sums = DiagnosticSums(all_diagnostics())
        sums.add({"first.moe": output, "second.moe": output})
        sums.values(remember)
    assert len(flats) == 2  # one call for all layers and all diagnostics
    sums = DiagnosticSums(all_diagnostics())
    sums.add({"first.moe": a, "second.moe": a})
    got = sums.values(lambda flat: flat + flats[1])
    torch.testing.assert_close(got["second.moe"], collect([a, b])["layers.00.moe"])


def test_sums_have_no_graph() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    probs = logits.softmax(-1)
    picked = probs.topk(2)
    output = RouterOutput.from_top_k(logits, probs, picked.indices, picked.values)
    for metrics in collect([output]).values():
        assert not any(value.requires_grad for value in metrics.values())


def test_adding_does_not_change_the_first_record() -> None:
    output = ex_a()
    before = output.dropped_per_expert.clone()
    collect([output, output])
    assert torch.equal(output.dropped_per_expert, before)


def test_layers_keep_their_order() -> None:
    sums = DiagnosticSums({"load": ExpertLoad()})
    names = [f"layers.{i:02d}.moe" for i in (3, 0, 11)]
    for _ in range(2):
        sums.add(dict.fromkeys(names, ex_a()))
    assert list(sums.values()) == names


def test_nothing_added_nothing_out() -> None:
    assert DiagnosticSums({"load": ExpertLoad()}).values() == {}
    assert DiagnosticSums({}).values() == {}
    assert flatten({}, "router") == ({}, {})


def test_flatten() -> None:
    sums = DiagnosticSums({"load": ExpertLoad(), "entropy": RouterEntropy()})
    sums.add({"layers.00.moe": ex_a(), "layers.01.moe": of_counts([4, 0, 0, 0])})
    scalars, distributions = flatten(sums.values(), "val/router")
    assert scalars["val/router/layers.00/max_violation"] == pytest.approx(0.5)
    assert scalars["val/router/layers.01/max_violation"] == pytest.approx(3)
    assert scalars["val/router/mean/max_violation"] == pytest.approx(1.75)
    assert distributions == {
        "val/router/layers.00/expert_load": [0.375, 0.25, 0.25, 0.125],
        "val/router/layers.01/expert_load": [1, 0, 0, 0],
    }
    assert len(scalars) == 3 * (7 + 3)  # two layers and their mean; 7 and 3 scalars
    assert all(type(value) is float for value in scalars.values())
