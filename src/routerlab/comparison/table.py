"""Groups of runs side by side: means over seeds, differences to a baseline, marks."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from routerlab.comparison import fairness
from routerlab.comparison.groups import (
    Group,
    by_label,
    choose_keys,
    listed,
    one_a_seed,
    text,
    value,
    vary,
)  # fmt: skip
from routerlab.comparison.runs import Run
from routerlab.comparison.statistics import differences, holm, interval, paired, t_test
from routerlab.core.config import ConfigError, nearest
from routerlab.core.identity import within
from routerlab.reports.run_files import number

Better = Literal["lower", "higher"]
HEADLINES = ("val/bits_per_byte", "val/accuracy")
USUAL_BASELINE = "token_choice"
_MOST_NAMES = 5  # of runs in one sentence
# Marks of single rows; those of differences to the baseline are in `fairness`.
LEAKS, AHEAD, MIXED = "leaks", "looks ahead", "mixed"


class Row(TypedDict):
    """The numbers of a group; None where there is none."""

    label: str
    values: dict[int, float]  # of the metric, by seed
    seeds: int
    unfinished: dict[str, int]  # state -> runs that are left out
    mean: float
    half: float | None  # half the width of the 95% t-interval of the mean
    best: float | None  # of a single run; None where neither direction is better
    best_run: str | None
    is_best: bool  # the best mean of those that do not leak
    difference: float | None  # mean difference to the baseline, seed by seed
    difference_half: float | None
    pairs: int  # seeds that both have
    p: float | None  # of the paired t-test, two-sided
    p_holm: float | None  # corrected for the number of rows with a p
    active_parameters: float | None
    total_parameters: float | None
    flops_per_token: float | None
    tokens_per_second: float | None
    tokens: float | None
    steps: float | None
    marks: list[str]  # why it is no fair comparison, in single words


@dataclass(frozen=True)
class Comparison:
    """Groups of runs by one metric, best mean first, and how far they can be compared."""

    groups: list[Group]
    metric: str
    by: list[str]  # config groups and dotted keys that tell the groups apart
    better: Better | None
    baseline: str | None  # the label that differences are taken to; None: one group only
    rows: list[Row]  # in the order of `groups`
    varying: dict[str, dict[str, Any]]  # config key -> label -> value, of keys that differ
    warnings: list[str]  # what makes the comparison unfair or incomplete
    notes: list[str]  # what else there is to know


def compare_groups(
    runs: Sequence[Run],
    by: Sequence[str] = (),
    metric: str | None = None,
    baseline: str | None = None,
) -> Comparison:
    """Finished runs in groups that are equal in the keys ``by`` (without any: see `choose_keys`).

    ``metric``: what most of them have of `HEADLINES`; ``baseline``: the group token_choice, else
    that of the first run. Raises `ConfigError` for an unknown key, metric or baseline, and where no
    run is finished.
    """
    done = [run for run in runs if run.state == "done"]
    if not done:
        raise ConfigError(f"no finished runs: {_named(runs)}")
    metric = metric or _usual_metric(done)
    values = _values(done, metric)
    keys, note = choose_keys(list(values), by)
    notes = [note] if note else []
    without = [run for run in done if run not in values]
    warnings = [f"Without {metric}, left out: {_named(without)}."] if without else []
    if unfinished := [run for run in runs if run.state != "done"]:
        warnings.append(f"Not finished, left out: {_named(unfinished)}.")

    groups, rows = [], []
    for label, members in by_label([*values, *without, *unfinished], keys).items():
        kept, said = one_a_seed(label, (run for run in members if run in values))
        warnings += said
        if not kept:
            warnings.append(f"{label} has no finished run with {metric}.")
            continue
        groups.append(Group(label, kept))
        rows.append(_row(groups[-1], values, members, direction(metric)))
        if mixed := vary([run for run in members if run in values]):
            rows[-1]["marks"].append(MIXED)
            warnings.append(_mixed(label, mixed, keys))
    base = _baseline([row["label"] for row in rows], baseline)
    notes += _differences(rows, base)
    warnings += _unfair(groups, rows, base)
    notes += _leaks(groups, rows, warnings)
    notes += fairness.places([run for group in groups for run in group.runs])
    order = _rank(rows, direction(metric))
    return Comparison(
        groups=[groups[i] for i in order],
        metric=metric,
        by=keys,
        better=direction(metric),
        baseline=base,
        rows=[rows[i] for i in order],
        varying=_varying(groups, keys),
        warnings=warnings,
        notes=notes,
    )


def direction(metric: str) -> Better | None:
    """Which values of a metric are better; None where neither is known to be."""
    if re.search("accuracy|tokens_per_second", metric):
        return "higher"
    return "lower" if re.search("loss|bits_per_byte", metric) else None


def _usual_metric(runs: Sequence[Run]) -> str:
    have = {metric: sum(_headline(run, metric) for run in runs) for metric in HEADLINES}
    return max(HEADLINES, key=lambda metric: have[metric])


def _headline(run: Run, metric: str) -> bool:
    return number(run.summary, *metric.split("/", 1)) is not None


def _values(runs: Sequence[Run], metric: str) -> dict[Run, float]:
    values = {run: value for run in runs if (value := run.value(metric)) is not None}
    if values:
        return values
    logged = {key for run in runs for key in run.logged()}
    if metric in logged:
        raise ConfigError(f"--metric {metric}: no finished run has a finite value of it")
    logged |= {f"val/{key}" for run in runs for key in run.summary.get("val", {})}
    raise ConfigError(f"--metric {metric}: no finished run has it; {nearest(metric, logged)}")


def _row(
    group: Group, values: Mapping[Run, float], members: Sequence[Run], better: Better | None
) -> Row:
    """The row of a group, as far as it needs no other group."""
    mine = {run.seed: values[run] for run in group.runs}
    mean = interval(list(mine.values()))
    pick = {"lower": min, "higher": max, None: None}[better]
    best = pick(group.runs, key=lambda run: values[run]) if pick else None
    return Row(
        label=group.label,
        values=mine,
        seeds=mean.count,
        unfinished=dict(Counter(run.state for run in members if run.state != "done")),
        mean=mean.mean,
        half=mean.half,
        best=values[best] if best else None,
        best_run=best.name if best else None,
        is_best=False,
        difference=None,
        difference_half=None,
        pairs=0,
        p=None,
        p_holm=None,
        **fairness.costs(group.runs),
        marks=[],
    )


def _baseline(labels: Sequence[str], asked: str | None) -> str | None:
    if asked is not None and asked not in labels:
        raise ConfigError(f"--baseline {asked}: no such group; {nearest(asked, labels)}")
    if len(labels) == 1:
        return None
    return asked or (USUAL_BASELINE if USUAL_BASELINE in labels else labels[0])


def _differences(rows: Sequence[Row], baseline: str | None) -> list[str]:
    """Fills in the differences to the baseline; a note on those that are missing or uncertain."""
    base = next((row for row in rows if row["label"] == baseline), None)
    if base is None:
        return []
    for row in rows:
        found = paired(row["values"], base["values"])
        if row is not base and found is not None:
            row["difference"], row["difference_half"] = found.mean, found.half
            row["pairs"] = found.count
            row["p"] = t_test(differences(row["values"], base["values"]))
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] or 0.0 for row in tested]), strict=True):
        row["p_holm"] = p
    others = [row for row in rows if row is not base]
    apart = [row["label"] for row in others if row["pairs"] == 0]
    single = [row["label"] for row in others if row["pairs"] == 1]
    notes = [f"No seed in common with {baseline}, so no difference: {listed(apart)}."]
    lone = f"One seed in common with {baseline}, so a difference without interval or p-value: "
    return notes * bool(apart) + [f"{lone}{listed(single)}."] * bool(single)


def _unfair(groups: Sequence[Group], rows: Sequence[Row], baseline: str | None) -> list[str]:
    """Marks the rows that are no fair comparison with the baseline, and says why."""
    at = next((i for i, row in enumerate(rows) if row["label"] == baseline), None)
    if at is None:
        return []
    found = {}
    for group, row in zip(groups, rows, strict=True):
        marks = fairness.differences(row, group.runs[0], rows[at], groups[at].runs[0])
        row["marks"] += marks
        found[row["label"]] = marks
    return fairness.sentences(found, str(baseline))


def _leaks(groups: Sequence[Group], rows: Sequence[Row], warnings: list[str]) -> list[str]:
    """Marks the rows whose routing looks at later tokens: those that do so in evaluation with a
    warning, those that do so in training alone with a note, which is returned.
    """
    marked: dict[str, list[str]] = {LEAKS: [], AHEAD: []}
    marks = {"in evaluation": LEAKS, "in training": AHEAD}
    for group, row in zip(groups, rows, strict=True):
        if mark := marks.get(fairness.looks_ahead(group.runs)):
            row["marks"].append(mark)
            marked[mark].append(row["label"])
    if leaking := marked[LEAKS]:
        warnings.append(
            f"Routing that depends on later tokens in evaluation, too: {listed(leaking)}. These "
            "numbers are not those of a language model."
        )
    said = "Routing that depends on later tokens in training, not in evaluation: "
    return [f"{said}{listed(marked[AHEAD])}."] if marked[AHEAD] else []


def _rank(rows: Sequence[Row], better: Better | None) -> list[int]:
    """The places of the rows, best mean first; the best that does not leak is marked as such."""
    if better is None:
        return sorted(range(len(rows)), key=lambda i: rows[i]["label"])
    sign = 1 if better == "lower" else -1
    order = sorted(range(len(rows)), key=lambda i: sign * rows[i]["mean"])
    for i in order:
        if LEAKS not in rows[i]["marks"]:
            rows[i]["is_best"] = len(rows) > 1
            break
    return order


def _mixed(label: str, keys: Sequence[str], by: Sequence[str]) -> str:
    keys = sorted(keys, key=lambda key: (key.endswith("_target_"), not within(key, tuple(by))))
    shown = ", ".join(keys[:_MOST_NAMES]) + (", ..." if len(keys) > _MOST_NAMES else "")
    apart = ",".join([*by, keys[0]])
    return f"{label} mixes runs that differ in {shown} (--by {apart} tells them apart)."


def _varying(groups: Sequence[Group], by: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The keys that differ between groups, first those of ``by``; several values in one group are
    joined by a bar.
    """
    runs = [run for group in groups for run in group.runs]
    found = {}
    for key in dict.fromkeys([*vary(runs, by), *vary(runs)]):
        values = {group.label: _shared(group.runs, key) for group in groups}
        if len({text(one) for one in values.values()}) > 1:
            found[key] = values
    return found


def _shared(runs: Iterable[Run], key: str) -> Any:
    found = {text(one): one for one in (value(run, key) for run in runs)}
    return next(iter(found.values())) if len(found) == 1 else " | ".join(sorted(found))


def _named(runs: Sequence[Run]) -> str:
    """``3 runs (a, b: failed, c: running)``; runs that are done without their state."""
    words = [run.name if run.state == "done" else f"{run.name}: {run.state}" for run in runs]
    more = [f"and {len(words) - _MOST_NAMES} more"] if len(words) > _MOST_NAMES else []
    listed = ", ".join(words[:_MOST_NAMES] + more)
    return f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} ({listed})"
