"""The frameworks' balancing rules: their own formulas, cases by hand, and what the audit says."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from routerlab.analysis.audit_loss import COLLAPSED, UNBALANCED, Audit, audit
from routerlab.analysis.balancing_rules import (
    RULES,
    RoutingSums,
    layer_values,
    records_of_logits,
    value_at_balance,
)
from routerlab.core.routing import RouterOutput
from routerlab.losses.load_balancing import LoadBalancingLoss
from tests.helpers.records import EX_A_PICKS, EX_A_PROBS, ex_a, random_record, record

BY_NAME = {rule.name: rule for rule in RULES}
SHAPES = [(1, 5, 3, 1), (2, 64, 8, 2), (3, 40, 6, 6), (4, 33, 16, 3)]  # L, T, E, K


def random_logits(num_layers: int, num_tokens: int, num_experts: int) -> Tensor:
    torch.manual_seed(num_layers)
    return 2 * torch.randn(num_layers, num_tokens, num_experts)


def sums_of(logits: Tensor, top_k: int, **changes: Any) -> RoutingSums:
    return RoutingSums.of(records_of_logits(logits, top_k, **changes))


def value(name: str, sums: RoutingSums) -> float:
    rule = BY_NAME[name]
    return float(layer_values(rule, sums).mean()) * value_at_balance(rule, sums)


def normalized(found: Audit) -> dict[str, float]:
    return {row.rule.name: row.normalized for row in found.rules}


def constant(*rows: list[float], num_tokens: int = 8) -> Tensor:
    """Layers in which all tokens have the same probabilities; [L T E] logits."""
    return torch.tensor(rows).log()[:, None].expand(-1, num_tokens, -1)


# -- against the frameworks ---------------------------------------------------------------------


@pytest.mark.parametrize(("num_layers", "num_tokens", "num_experts", "top_k"), SHAPES)
@pytest.mark.parametrize("padded", [False, True])
def test_transformers_is_what_transformers_reports(
    num_layers: int, num_tokens: int, num_experts: int, top_k: int, padded: bool
) -> None:
    logits = random_logits(num_layers, num_tokens, num_experts)
    mask = torch.arange(num_tokens) % 4 != 3 if padded else None
    attention_mask = None if mask is None else mask[None].long()
    theirs = load_balancing_loss_func(
        tuple(logits), num_experts, top_k, attention_mask=attention_mask
    )
    ours = value("transformers", sums_of(logits, top_k, valid=mask))
    assert ours == pytest.approx(float(theirs), rel=1e-6)


def literal(name: str, logits: Tensor, top_k: int) -> Tensor:
    """One layer's loss, in the order of operations of each framework's source or paper."""
    num_tokens, num_experts = logits.shape
    probs = logits.double().softmax(-1)
    mask = F.one_hot(probs.topk(top_k).indices, num_experts).double()  # [T K E]
    counts, first = mask.sum((0, 1)), mask[:, 0]
    if name in ("Megatron aux_loss", "Megatron global_aux_loss", "OLMo-core/MegaBlocks"):
        return (probs.sum(0) * counts).sum() * num_experts / (num_tokens**2 * top_k)
    if name == "flaxformer":
        return (mask.amax(1).mean(0) * probs.mean(0)).mean() * num_experts**2
    if name == "DeepSeekMoE":
        return (counts * num_experts / (top_k * num_tokens) * probs.mean(0)).sum()
    if name == "mesh-TF":
        return (probs.mean(0) * first.mean(0)).mean() * (num_experts * num_experts)
    if name == "GShard (paper)":
        return (first.sum(0) / num_tokens * probs.mean(0)).mean()
    assert name == "DeepSpeed/tutel"
    return (probs.sum(0) * (first * num_experts / num_tokens).sum(0)).sum() / num_tokens


@pytest.mark.parametrize(("num_layers", "num_tokens", "num_experts", "top_k"), SHAPES)
@pytest.mark.parametrize("name", [n for n in BY_NAME if n not in ("ours", "transformers")])
def test_every_rule_is_its_frameworks_formula(
    name: str, num_layers: int, num_tokens: int, num_experts: int, top_k: int
) -> None:
    logits = random_logits(num_layers, num_tokens, num_experts)
    layers = torch.stack([literal(name, layer, top_k) for layer in logits])
    means = ("OLMo-core/MegaBlocks", "flaxformer")
    expected = layers.mean() if name in means else layers.sum()
    assert value(name, sums_of(logits, top_k)) == pytest.approx(float(expected), rel=1e-6)


def test_ours_is_our_loss() -> None:
    records = [random_record(12, 5, 2, seed=0), random_record(12, 5, 2, seed=1)]
    sums = RoutingSums.of([{"a": records[0], "b": records[1]}])
    expected = sum(float(LoadBalancingLoss(scope="global")(r)) for r in records) / 2
    assert value("ours", sums) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_every_rule_has_its_value_at_balance(top_k: int) -> None:
    # E = 4 tokens, token t prefers t, t+1, ...: every expert is first, second ... exactly once
    shifted = torch.stack([torch.arange(4.0).flip(0).roll(t) for t in range(4)])
    sums = sums_of(shifted.expand(3, 4, 4), top_k)
    for row in audit(sums).rules:
        assert row.normalized == pytest.approx(1, rel=1e-6)
    expected = {"ours": 1, "transformers": top_k, "flaxformer": top_k, "OLMo-core/MegaBlocks": 1}
    expected |= {"Megatron aux_loss": 3, "DeepSeekMoE": 3, "mesh-TF": 3, "DeepSpeed/tutel": 3}
    expected |= {"Megatron global_aux_loss": 3, "GShard (paper)": 3 / 16}
    assert {n: value_at_balance(r, sums) for n, r in BY_NAME.items()} == pytest.approx(expected)


# -- cases by hand ------------------------------------------------------------------------------


def test_one_pick() -> None:
    # f = [.75, .25], P = [.65, .35]: 2 (.4875 + .0875) = 1.15
    probs = [[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]
    sums = RoutingSums.of([{"layer": record(probs, [[0], [0], [0], [1]])}])
    for row in audit(sums).rules:
        assert row.normalized == pytest.approx(1.15, abs=1e-12), row.rule.name
    assert value("GShard (paper)", sums) == pytest.approx(1.15 / 4)


def test_a_uniform_router() -> None:
    # P = 1/E: the value is the one at balance whatever the picks are
    sums = sums_of(torch.zeros(1, 8, 4), top_k=2)
    names = ("transformers", "flaxformer", "Megatron aux_loss", "OLMo-core/MegaBlocks")
    assert [value(name, sums) for name in names] == pytest.approx([2.0, 2.0, 1.0, 1.0])


def test_layers_pooled_before_the_product_balance_each_other() -> None:
    # each layer 2 * .99 = 1.98; pooled f = [.5, .5], P = [.5, .5]
    found = audit(sums_of(constant([0.99, 0.01], [0.01, 0.99]), top_k=1))
    assert normalized(found)["transformers"] == pytest.approx(1.0)
    assert normalized(found)["ours"] == pytest.approx(1.98)
    assert [layer.value for layer in found.layers] == pytest.approx([1.98, 1.98])


def test_micro_batches_that_balance_each_other() -> None:
    # alone 2 * .9 = 1.8 each; together f = P = [.5, .5]; f so far: [1, 0], then [.5, .5]
    pieces = [[0.9, 0.1], [0.1, 0.9]]
    logits = torch.cat([constant(piece) for piece in pieces], dim=1)
    sums = sums_of(logits, top_k=1, micro_batches=2)
    each = layer_values(BY_NAME["Megatron aux_loss"], sums)
    so_far = layer_values(BY_NAME["Megatron global_aux_loss"], sums)
    assert each.tolist() == [pytest.approx([1.8, 1.8])]
    assert so_far.tolist() == [pytest.approx([1.8, 1.0])]
    found = audit(sums)
    assert normalized(found)["ours"] == pytest.approx(1.0)
    assert normalized(found)["Megatron global_aux_loss"] == pytest.approx(1.4)
    about = [text for text in found.warnings if "each micro-batch alone" in text]
    assert any(text.startswith("Megatron aux_loss") for text in about)
    assert any("f of the micro-batches so far" in text for text in found.warnings)


def test_the_counts_of_a_layer() -> None:
    # c = [3, 2, 2, 1] of 8; E sum f P = 1.075; first picks [3, 0, 0, 1] / 4
    (layer,) = audit(RoutingSums.of([{"layer": ex_a()}])).layers
    assert layer.value == pytest.approx(1.075)
    assert layer.first_pick_value == pytest.approx(4 * (0.75 * 0.375 + 0.25 * 0.225))
    assert layer.max_violation == pytest.approx(0.5)
    assert layer.effective_experts == pytest.approx(3.555556, abs=1e-6)
    assert (layer.dead_experts, layer.collapsed, layer.unbalanced) == (0, False, False)


def test_the_first_pick_is_the_most_probable_one_picked() -> None:
    swapped = [picks[::-1] for picks in EX_A_PICKS]
    one, other = (RoutingSums.of([{"a": record(EX_A_PROBS, p)}]) for p in (EX_A_PICKS, swapped))
    assert one.first_picks.tolist() == other.first_picks.tolist() == [[[3, 0, 0, 1]]]
    third = RoutingSums.of([{"a": record(EX_A_PROBS, [[1, 2], [3, 2], [0, 1], [1, 3]])}])
    assert third.first_picks.tolist() == [[[0, 2, 1, 1]]]  # .2, .15, .15, .2: of the picks


# -- what the audit says ------------------------------------------------------------------------


def test_four_layers_collapsed_on_different_experts_are_caught() -> None:
    collapsed = torch.full((4, 64, 4), -20.0)
    for layer in range(4):
        collapsed[layer, :, layer] = 20.0
    assert float(load_balancing_loss_func(tuple(collapsed), 4, 1)) == pytest.approx(1.0)
    found = audit(sums_of(collapsed, top_k=1))
    ratios = normalized(found)
    assert ratios.pop("transformers") == pytest.approx(1.0)
    assert list(ratios.values()) == pytest.approx([4.0] * len(ratios))
    for layer in found.layers:
        assert (layer.value, layer.max_violation) == pytest.approx((4.0, 3.0))
        assert (layer.dead_experts, layer.collapsed) == (3, True)
    names = [layer.name for layer in found.layers]
    hiding = {row.rule.name: row.hides for row in found.rules if row.hides}
    assert hiding == {"transformers": names}
    assert found.warnings[0].startswith("transformers (1.00) looks balanced and hides layers.00")
    assert "layers are pooled before the product" in found.warnings[1]


def test_the_same_expert_everywhere_hides_from_nobody() -> None:
    same = torch.full((4, 64, 4), -20.0)
    same[:, :, 0] = 20.0
    found = audit(sums_of(same, top_k=1))
    assert list(normalized(found).values()) == pytest.approx([4.0] * len(RULES))
    assert found.warnings == []
    assert not any(row.hides for row in found.rules)


def test_second_picks_that_collapse_hide_from_rules_of_first_picks() -> None:
    # 16 experts; firsts go round 1..15 with .55, all seconds to 0 with .45:
    # all picks 16 (.5 * .45 + .5 * .55/15) = 3.893; first picks 16 * .55/15 = .587
    num_experts = 16
    probs = torch.zeros(45, num_experts)
    first = 1 + torch.arange(45) % 15
    probs[torch.arange(45), first], probs[:, 0] = 0.55, 0.45
    picks = torch.stack([first, torch.zeros_like(first)], dim=1)
    found = audit(RoutingSums.of([{"layer": record(probs, picks)}]))
    ratios = normalized(found)
    assert ratios["ours"] == pytest.approx(16 * (0.5 * 0.45 + 0.5 * 0.55 / 15))
    firsts = ("mesh-TF", "GShard (paper)", "DeepSpeed/tutel")
    for name in firsts:
        assert ratios[name] == pytest.approx(16 * 0.55 / 15)
    assert {row.rule.name for row in found.rules if row.hides} == set(firsts)
    assert any("only first picks count" in text for text in found.warnings)


def test_collapse_under_flat_probabilities_hides_from_every_rule() -> None:
    # all picks on expert 0, which is preferred by a hair: 4 * .2503 = 1.001
    found = audit(sums_of(constant([0.2503, 0.2499, 0.2499, 0.2499]), top_k=1))
    assert found.layers[0].value == pytest.approx(1.0012)
    assert found.layers[0].value < UNBALANCED
    assert found.layers[0].collapsed
    assert all(row.hides == ["layers.00"] for row in found.rules)
    assert found.warnings[0].startswith("ours (1.00), transformers (1.00)")


def test_one_bad_layer_among_many_hides_in_their_mean() -> None:
    # 3 balanced experts in 30 layers, one layer on expert 0: (29 + 3) / 30 = 1.067
    even = torch.eye(3)[torch.arange(9) % 3].mul(50.0).expand(29, 9, 3)
    found = audit(sums_of(torch.cat([even, torch.tensor([50.0, 0, 0]).expand(1, 9, 3)]), top_k=1))
    assert normalized(found)["ours"] == pytest.approx(32 / 30)
    assert found.rules[0].hides == ["layers.29"]


def test_a_factor_is_a_note_and_not_a_warning() -> None:
    found = audit(sums_of(torch.zeros(3, 8, 4), top_k=2))
    disagreeing = [text for text in found.warnings if "ours" in text and "hide" not in text]
    assert disagreeing == []
    (note,) = found.notes
    assert "transformers, flaxformer x 2" in note
    assert "Megatron aux_loss" in note
    assert "x 3" in note


@pytest.mark.parametrize(
    ("num_experts", "top_k", "on", "collapsed"),
    [(8, 2, 2, True), (8, 2, 8, False), (16, 2, 3, True), (16, 2, 4, False), (33, 32, 33, False),
     (4, 4, 4, False), (3, 1, 1, True)],
)  # fmt: skip
def test_collapse_is_a_tenth_of_the_way_from_k_to_all(
    num_experts: int, top_k: int, on: int, collapsed: bool
) -> None:
    # picks go round `on` experts, so there are `on` effective experts
    assert collapsed == (on < top_k + COLLAPSED * (num_experts - top_k))
    tokens = 5 * on
    picks = (torch.arange(tokens)[:, None] + torch.arange(top_k)) % on
    probs = torch.full((tokens, num_experts), 1 / num_experts)
    (layer,) = audit(RoutingSums.of([{"layer": record(probs, picks)}])).layers
    assert layer.effective_experts == pytest.approx(on)
    assert layer.dead_experts == num_experts - on
    assert layer.collapsed == collapsed


# -- records that are not K picks of every token --------------------------------------------------


def test_drops_count_as_asked_for() -> None:
    kept = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    whole, cut = (RoutingSums.of([{"a": ex_a(kept=k)}]) for k in (None, kept))
    assert torch.equal(whole.picks, cut.picks)
    assert cut.first_picks.tolist() == [[[1, 1, 0, 1]]]  # the last token has no pick left
    assert any("1 times a token has no kept pick" in text for text in audit(cut).notes)


def test_experts_that_choose_have_as_many_picks_as_they_have() -> None:
    probs = torch.tensor(EX_A_PROBS, dtype=torch.float64)
    chosen = torch.tensor([[0, 1], [1, 0], [2, 3], [2, 3]])  # E C
    weights = torch.ones(4, 2, dtype=torch.float64)
    found = audit(
        RoutingSums.of(
            [{"a": RouterOutput.from_expert_choice(probs.log(), probs, chosen, weights)}]
        )
    )
    assert found.top_k == 2.0
    assert normalized(found)["ours"] == pytest.approx(1.0)
    assert found.layers[0].max_violation == pytest.approx(0.0)


def test_padding_changes_nothing() -> None:
    logits = random_logits(2, 12, 4)
    padded = torch.cat([logits, torch.full((2, 4, 4), torch.nan)], dim=1)
    valid = torch.arange(16) < 12
    plain, found = audit(sums_of(logits, 2)), audit(sums_of(padded, 2, valid=valid))
    assert found.as_dict() == plain.as_dict()


def test_cutting_a_batch_leaves_ours_alone() -> None:
    logits = random_logits(2, 12, 4)
    whole, cut = sums_of(logits, 2), sums_of(logits, 2, micro_batches=3)
    assert value("ours", cut) == pytest.approx(value("ours", whole), rel=1e-12)
    pieces = [value("transformers", sums_of(logits[:, i : i + 4], 2)) for i in (0, 4, 8)]
    assert value("transformers", cut) == pytest.approx(sum(pieces) / 3, rel=1e-12)


def test_the_figures_are_plain() -> None:
    found = json.loads(json.dumps(audit(sums_of(random_logits(2, 12, 4), 2)).as_dict()))
    assert {row["rule"]["name"] for row in found["rules"]} == set(BY_NAME)
    assert found["thresholds"]["unbalanced"] == UNBALANCED


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_k", "micro_batches", "message"),
    [(0, 1, "top_k=0: must be from 1"), (5, 1, "top_k=5: must be from 1 to the 4 experts"),
     (2, 5, "micro_batches=5: must divide the 12 tokens"), (2, 0, "micro_batches=0")],
)  # fmt: skip
def test_bad_arguments(top_k: int, micro_batches: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        records_of_logits(torch.zeros(1, 12, 4), top_k, micro_batches=micro_batches)


def test_logits_that_are_not_finite_are_named() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[1, 2, 3] = torch.inf
    with pytest.raises(ValueError, match="layers.01: 1 of 12 logits are not finite"):
        records_of_logits(logits, 2)


def test_nothing_to_look_at() -> None:
    with pytest.raises(ValueError, match="no routed layer"):
        RoutingSums.of([])
    all_padding = records_of_logits(torch.zeros(1, 4, 4), 2, valid=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no real token"):
        RoutingSums.of(all_padding)
    with pytest.raises(ValueError, match=r"\[4, 5\] experts"):
        RoutingSums.of([{"a": random_record(4, 4, 2), "b": random_record(4, 5, 2)}])
