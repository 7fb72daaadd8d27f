"""Every diagnostic on examples worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from routerlab.core.protocols import Diagnostic
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.diagnostics.expert_by_domain import ExpertByDomain
from routerlab.diagnostics.expert_load import ExpertLoad
from routerlab.diagnostics.router_entropy import RouterEntropy
from routerlab.diagnostics.router_logits import RouterLogits
from routerlab.diagnostics.selection_margin import SelectionMargin
from routerlab.ops.capacity import within_capacity
from tests.helpers.records import EX_A_PICKS, EX_A_PROBS, ex_a, random_record, record

LOAD, ENTROPY, MARGIN = ExpertLoad(), RouterEntropy(), SelectionMargin()


def measure(
    diagnostic: Diagnostic, output: RouterOutput, context: RoutingContext | None = None
) -> dict[str, Tensor]:
    sums = {key: value.double() for key, value in diagnostic.sums(output, context).items()}
    return diagnostic.values(sums)


def scalars(diagnostic: Diagnostic, output: RouterOutput) -> dict[str, float]:
    return {k: v.item() for k, v in measure(diagnostic, output).items() if v.ndim == 0}


def of_counts(counts: list[int]) -> RouterOutput:
    """A record with the given numbers of top-1 picks."""
    picks = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None]
    return record(torch.full((len(picks), len(counts)), 1 / len(counts)), picks)


# -- the running example --------------------------------------------------------------------------


def test_load_of_the_running_example() -> None:  # section 1; c = [3, 2, 2, 1]
    values = scalars(LOAD, ex_a())
    assert values == pytest.approx(
        {
            "load_cv": 0.353553,
            "max_violation": 0.5,
            "min_violation": 0.5,
            "load_entropy": 0.952820,
            "effective_experts": 3.555556,
            "dead_experts": 0,
            "dropped_share": 0,
        },
        abs=1e-6,
    )
    assert measure(LOAD, ex_a())["expert_load"].tolist() == [0.375, 0.25, 0.25, 0.125]


def test_entropies_of_the_running_example() -> None:  # section 3
    assert scalars(ENTROPY, ex_a()) == pytest.approx(
        {"mean_entropy": 0.823499, "entropy_of_mean": 0.971805, "mutual_information": 0.148306},
        abs=1e-6,
    )


def test_mutual_information_is_the_mean_divergence_from_the_mean() -> None:
    p = torch.tensor(EX_A_PROBS, dtype=torch.float64)
    divergence = (p * (p / p.mean(0)).log()).sum(-1).mean() / math.log(4)
    assert scalars(ENTROPY, ex_a())["mutual_information"] == pytest.approx(
        float(divergence), abs=1e-12
    )


def test_margins_of_the_running_example() -> None:  # section 3: .6,.45,.6,.4 and .05,.2,.05,.1
    assert scalars(MARGIN, ex_a()) == pytest.approx({"top1_prob": 0.5125, "boundary_margin": 0.1})


def test_logit_norm() -> None:
    logits = torch.tensor([[3.0, 4.0], [0.0, 1.0]])  # norms 5 and 1
    output = RouterOutput.from_top_k(
        logits, logits.softmax(-1), torch.ones(2, 1, dtype=torch.long), torch.ones(2, 1)
    )
    assert scalars(RouterLogits(), output) == {"logit_norm": 3.0}


@pytest.mark.parametrize(("capacity", "share"), [(2, 0.125), (3, 0.0), (1, 0.5)])
def test_dropped_share_of_the_running_example(capacity: int, share: float) -> None:  # section 2
    output = ex_a(within_capacity(torch.tensor(EX_A_PICKS), capacity))
    values = scalars(LOAD, output)
    assert values.pop("dropped_share") == share
    # counted before the drops: all other numbers stay
    full = scalars(LOAD, ex_a())
    del full["dropped_share"]
    assert values == full


# -- references and identities --------------------------------------------------------------------


def test_collapsed_reference() -> None:
    assert scalars(LOAD, of_counts([4, 0, 0, 0])) == pytest.approx(
        {
            "load_cv": 1.732051,
            "max_violation": 3,
            "min_violation": 1,
            "load_entropy": 0,
            "effective_experts": 1,
            "dead_experts": 3,
            "dropped_share": 0,
        },
        abs=1e-6,
    )


def test_half_dead_reference() -> None:
    values = scalars(LOAD, of_counts([2, 2, 2, 2, 0, 0, 0, 0]))
    assert values["load_cv"] == pytest.approx(1)
    assert values["effective_experts"] == pytest.approx(4)
    assert values["dead_experts"] == 4
    assert values["load_entropy"] == pytest.approx(math.log(4) / math.log(8))


def test_uniform_reference() -> None:
    assert scalars(LOAD, of_counts([3, 3, 3, 3])) == pytest.approx(
        {
            "load_cv": 0,
            "max_violation": 0,
            "min_violation": 0,
            "load_entropy": 1,
            "effective_experts": 4,
            "dead_experts": 0,
            "dropped_share": 0,
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("counts", [[3, 1], [5, 0, 2], [1, 2, 3, 4, 9]])
def test_effective_experts_is_e_over_one_plus_cv_squared(counts: list[int]) -> None:
    values = scalars(LOAD, of_counts(counts))
    assert values["effective_experts"] == pytest.approx(len(counts) / (1 + values["load_cv"] ** 2))
    mean = sum(counts) / len(counts)
    assert values["max_violation"] + 1 == pytest.approx(max(counts) / mean)


def test_counts_may_be_scaled() -> None:
    assert scalars(LOAD, of_counts([6, 4, 4, 2])) == pytest.approx(scalars(LOAD, ex_a()))


def test_mutual_information_is_zero_for_equal_tokens() -> None:
    output = record([[0.7, 0.2, 0.1]] * 5, [[0]] * 5)
    assert scalars(ENTROPY, output)["mutual_information"] == pytest.approx(0, abs=1e-12)


def test_mutual_information_is_one_for_certain_and_balanced_tokens() -> None:  # ln E / ln E
    values = scalars(ENTROPY, record(torch.eye(4), torch.arange(4)[:, None]))
    assert values == pytest.approx(
        {"mean_entropy": 0, "entropy_of_mean": 1, "mutual_information": 1}, abs=1e-12
    )


def test_one_expert_is_no_division_by_zero() -> None:
    output = record(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.long))
    for diagnostic in (LOAD, ENTROPY, MARGIN):
        assert all(math.isfinite(v) for v in scalars(diagnostic, output).values())


def test_no_boundary_when_all_experts_are_picked() -> None:
    p = torch.tensor(EX_A_PROBS)
    values = scalars(MARGIN, record(p, torch.arange(4).expand(4, 4)))
    assert values == pytest.approx({"top1_prob": 0.5125, "boundary_margin": 0})


def test_a_token_without_experts_counts_zero() -> None:
    # tokens 1 to 3 lose both picks: margins .05, 0, 0, 0
    kept = torch.tensor([[True, True], [False] * 2, [False] * 2, [False] * 2])
    assert scalars(MARGIN, ex_a(kept))["boundary_margin"] == pytest.approx(0.05 / 4)


def test_margin_is_negative_where_something_else_chose() -> None:
    # expert 2 (.1) was taken before expert 1 (.3): .1 - .3
    output = record([[0.6, 0.3, 0.1]], [[0, 2]])
    assert scalars(MARGIN, output)["boundary_margin"] == pytest.approx(-0.2)


@pytest.mark.parametrize("diagnostic", [LOAD, ENTROPY, MARGIN, RouterLogits()])
def test_invariant_to_relabelling_experts(diagnostic: Diagnostic) -> None:
    output, order = random_record(9, 5, 2), torch.tensor([4, 2, 0, 1, 3])
    moved = record(output.router_probs[:, order], order.argsort()[output.expert_indices].view(9, 2))
    assert scalars(diagnostic, moved) == pytest.approx(scalars(diagnostic, output), rel=1e-12)


def test_relabelling_permutes_the_distribution() -> None:
    output, order = random_record(9, 5, 2), torch.tensor([4, 2, 0, 1, 3])
    moved = record(output.router_probs[:, order], order.argsort()[output.expert_indices].view(9, 2))
    got, plain = (measure(LOAD, o)["expert_load"] for o in (moved, output))
    assert torch.equal(got, plain[order])


# -- domains --------------------------------------------------------------------------------------

TWO_DOMAINS = [[0, 1], [0, 1], [0, 2], [0, 3], [1, 2], [2, 3], [2, 3], [2, 0]]


def domains(picks: list[list[int]], domain_ids: list[int], num_domains: int) -> dict[str, Tensor]:
    output = record(torch.full((len(picks), 4), 0.25), picks)
    length = len(picks) // len(domain_ids)
    ids = torch.tensor(domain_ids)
    context = RoutingContext(len(ids), length, domain_ids=ids, num_domains=num_domains)
    return measure(ExpertByDomain(), output, context)


def test_expert_by_domain() -> None:  # section 4
    values = domains(TWO_DOMAINS, [0, 1], 2)
    assert values["expert_by_domain"].tolist() == [[1, 0.5, 0.25, 0.25], [0.25, 0.25, 1, 0.5]]
    assert values["domain_information"].item() == pytest.approx(0.204434, abs=1e-6)
    assert values["domain_information"].item() * math.log(2) == pytest.approx(0.141703, abs=1e-6)
    assert values["expert_by_domain"].sum(1).tolist() == [2, 2]  # K


def test_domains_weigh_equally() -> None:
    # domain 1 seen three times as often: the same table, the same information
    values = domains(TWO_DOMAINS + TWO_DOMAINS[4:] * 2, [0, 1, 1, 1], 2)
    assert values["domain_information"].item() == pytest.approx(0.204434, abs=1e-6)


def test_a_domain_that_was_not_seen() -> None:
    values = domains(TWO_DOMAINS, [0, 2], 3)
    assert values["expert_by_domain"][1].tolist() == [0, 0, 0, 0]
    # two domains were seen: the information is still relative to ln 2
    assert values["domain_information"].item() == pytest.approx(0.204434, abs=1e-6)
    assert domains(TWO_DOMAINS[:4], [1], 3)["domain_information"].item() == 0


def test_the_expert_tells_the_domain() -> None:
    values = domains([[0, 1]] * 4 + [[2, 3]] * 4, [0, 1], 2)
    assert values["domain_information"].item() == pytest.approx(1)


def test_no_domains_no_table() -> None:
    diagnostic = ExpertByDomain()
    assert diagnostic.sums(ex_a()) == {}
    assert diagnostic.sums(ex_a(), RoutingContext(1, 4)) == {}
    assert diagnostic.values({}) == {}


# -- padding and graphs ---------------------------------------------------------------------------

ALL = [LOAD, ENTROPY, MARGIN, RouterLogits(), ExpertByDomain()]


@pytest.mark.parametrize("diagnostic", ALL, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("padding", [0.25, torch.nan, torch.inf])
def test_padding_changes_nothing(diagnostic: Diagnostic, padding: float) -> None:
    # 2 sequences of 4 tokens, 2 and 3 of them real
    valid = torch.tensor([True, True, False, False, True, True, True, False])
    real = random_record(5, 4, 2)
    probs = torch.full((8, 4), padding, dtype=torch.float64)
    probs[valid] = real.router_probs
    picks = torch.zeros(8, 2, dtype=torch.long)
    picks[valid] = real.expert_indices.view(5, 2)
    padded = record(probs, picks, valid=valid)
    ids = torch.tensor([0, 1])
    got = measure(
        diagnostic, padded, RoutingContext(2, 4, valid=valid, domain_ids=ids, num_domains=2)
    )
    each = torch.tensor([0, 0, 1, 1, 1])  # five sequences of one token
    expected = measure(diagnostic, real, RoutingContext(5, 1, domain_ids=each, num_domains=2))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("diagnostic", ALL, ids=lambda d: type(d).__name__)
def test_nothing_but_padding_is_finite(diagnostic: Diagnostic) -> None:
    output = random_record(4, 3, 2, valid=torch.zeros(4, dtype=torch.bool))
    ids = torch.tensor([0, 1])
    context = RoutingContext(2, 2, valid=output.valid, domain_ids=ids, num_domains=2)
    for value in measure(diagnostic, output, context).values():
        assert value.isfinite().all()
