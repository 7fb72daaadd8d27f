"""What each framework's load-balancing rule reports of the same routing, and where it misleads."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from routerlab.analysis.balancing_rules import (
    OURS,
    RULES,
    RoutingSums,
    Rule,
    layer_values,
    value_at_balance,
)

LOOKS_BALANCED = 1.1  # a rule below this, in units of its value at balance, raises no suspicion
UNBALANCED = 1.5  # a layer whose own E sum f P is above this is not balanced
COLLAPSED = 0.1  # a layer is collapsed this share of the way from K to E effective experts
DISAGREES = 0.1  # relative difference from our rule


@dataclass(frozen=True)
class RuleValue:
    """What a rule reports: ``normalized`` is ``value / at_balance``, and a weight of ours does as
    much as a weight of theirs when it is ``at_balance`` times as large. ``hides`` names unbalanced
    layers that it does not betray.
    """

    rule: Rule
    value: float
    at_balance: float
    normalized: float
    hides: list[str]


@dataclass(frozen=True)
class LayerState:
    """A layer alone, over the whole batch; the last four come from the counts c alone."""

    name: str
    value: float  # E sum f P
    first_pick_value: float
    max_violation: float  # max c / mean c - 1
    dead_experts: int
    effective_experts: float  # 1 / sum f^2
    collapsed: bool

    @property
    def unbalanced(self) -> bool:
        """Whether a rule should have raised an alarm."""
        return self.collapsed or self.value > UNBALANCED


@dataclass(frozen=True)
class Audit:
    """The rules beside each other, the layers, and what to know about them."""

    num_tokens: int
    num_experts: int
    top_k: float
    micro_batches: int
    rules: list[RuleValue]
    layers: list[LayerState]
    warnings: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text, with the thresholds that the warnings used."""
        thresholds = {"looks_balanced": LOOKS_BALANCED, "unbalanced": UNBALANCED}
        thresholds |= {"collapsed": COLLAPSED, "disagrees": DISAGREES}
        return asdict(self) | {"thresholds": thresholds}


def audit(sums: RoutingSums) -> Audit:
    """Every rule's value on a routing, and warnings where a rule misleads or differs from ours."""
    layers = _layers(sums)
    unbalanced, rules = [layer.name for layer in layers if layer.unbalanced], []
    for rule in RULES:
        normalized = float(layer_values(rule, sums).mean())
        at_balance = value_at_balance(rule, sums)
        hides = unbalanced if normalized < LOOKS_BALANCED else []
        rules.append(RuleValue(rule, normalized * at_balance, at_balance, normalized, hides))
    warnings = [*_hidden(rules, layers), *_disagreements(sums)]
    notes = _scale(rules)
    missing = int(sums.num_tokens.sum() - sums.first_picks.sum())
    if missing:
        notes.append(
            f"{missing} times a token has no kept pick in a layer (capacity, or experts that "
            "choose): rules of first picks leave it out"
        )
    num_tokens, (_, pieces, num_experts) = int(sums.num_tokens[0].sum()), sums.picks.shape
    return Audit(num_tokens, num_experts, sums.top_k, pieces, rules, layers, warnings, notes)


def _layers(sums: RoutingSums) -> list[LayerState]:
    values = layer_values(OURS, sums)[:, 0].tolist()
    first = layer_values(Rule("first picks", "first", "batch", "mean"), sums)[:, 0].tolist()
    counts, tokens = sums.picks.sum(1), sums.num_tokens.sum(1)
    load = counts / counts.sum(-1, keepdim=True)
    num_experts, effective = counts.shape[1], 1 / load.square().sum(-1)
    top_k = counts.sum(-1) / tokens[:, 0]
    threshold = top_k + COLLAPSED * (num_experts - top_k)
    collapsed = (effective < threshold) & (top_k < num_experts)
    violation, dead = num_experts * load.amax(-1) - 1, (counts == 0).sum(-1)
    columns = (violation.tolist(), dead.tolist(), effective.tolist(), collapsed.tolist())
    rows = zip(sums.layers, values, first, *columns, strict=True)
    return [LayerState(*row) for row in rows]


def _hidden(rules: list[RuleValue], layers: list[LayerState]) -> list[str]:
    """Rules that look balanced while a layer is not."""
    blind = [f"{r.rule.name} ({r.normalized:.2f})" for r in rules if r.hides]
    bad = [
        f"{layer.name} ({layer.value:.2f}{', collapsed' if layer.collapsed else ''})"
        for layer in layers
        if layer.unbalanced
    ]
    if not blind:
        return []
    verbs = ("look", "hide") if len(blind) > 1 else ("looks", "hides")
    return [f"{', '.join(blind)} {verbs[0]} balanced and {verbs[1]} {_some(bad)}"]


def _disagreements(sums: RoutingSums) -> list[str]:
    """Rules whose normalised value, in total or in a layer, is not ours; alike ones in one line."""
    ours = layer_values(OURS, sums)[:, 0]
    alike: dict[tuple[str, str, bool], list[Rule]] = {}
    for rule in RULES[1:]:
        how = (rule.picks, rule.tokens, rule.layers == "pool")
        alike.setdefault(how, []).append(rule)
    found = []
    for rules in alike.values():
        pooled = rules[0].layers == "pool"
        theirs = layer_values(rules[0], sums).mean(1)
        own = ours.mean()[None] if pooled else ours
        differs = (theirs / own - 1).abs() > DISAGREES
        if differs.any():
            where = ["all layers"] if pooled else sums.layers
            rows = zip(where, theirs.tolist(), own.tolist(), differs.tolist(), strict=True)
            values = [f"{name} {a:.2f}, ours {b:.2f}" for name, a, b, differ in rows if differ]
            names = ", ".join(rule.name for rule in rules)
            found.append(f"{names} ({_reason(rules[0], sums)}): {_some(values, '; ')}")
    return found


def _reason(rule: Rule, sums: RoutingSums) -> str:
    """How a rule is unlike ours on this routing."""
    reasons = ["layers are pooled before the product"] if rule.layers == "pool" else []
    reasons += ["only first picks count"] if rule.picks == "first" else []
    if sums.picks.shape[1] > 1:
        how = {"micro": "each micro-batch alone", "so far": "f of the micro-batches so far"}
        reasons.append(how[rule.tokens])
    return ", ".join(reasons)


def _scale(rules: list[RuleValue]) -> list[str]:
    """Rules that differ from ours by a factor alone."""
    ours = rules[0].normalized
    factors: dict[str, list[str]] = {}
    for found in rules[1:]:
        if found.at_balance != 1 and abs(found.normalized / ours - 1) <= DISAGREES:
            factors.setdefault(f"{found.at_balance:.4g}", []).append(found.rule.name)
    lines = [f"{', '.join(names)} x {factor}" for factor, names in factors.items()]
    return [f"another scale, the same verdict in total: {'; '.join(lines)}"] if lines else []


def _some(texts: Sequence[str], separator: str = ", ", most: int = 4) -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more
