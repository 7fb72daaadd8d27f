"""What makes a comparison unfair: rows that differ in more than what is compared."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from routerlab.comparison.groups import listed, text, value, vary
from routerlab.comparison.runs import Run
from routerlab.core.identity import within
from routerlab.reports.run_files import number

TOLERANCE = {"tokens": 0.01, "active_parameters": 0.01, "flops_per_token": 0.05}  # not marked
_MARKS = {"tokens": "tokens", "active_parameters": "active", "flops_per_token": "FLOPs"}
_WORDS = {"tokens": "tokens seen", "active": "active parameters", "FLOPs": "FLOPs per token"}
_BATCH = ("data.batch_size", "objective.micro_batches")
_STEPS = "trainer.max_steps"
_MOST_KEYS = 4  # named in one sentence


def costs(runs: Sequence[Run]) -> dict[str, float | None]:
    """Means over runs of what they took; None where no run says it."""
    places = {
        "active_parameters": ("parameters", "active"),
        "total_parameters": ("parameters", "total"),
    }
    names = ("flops_per_token", "tokens_per_second", "tokens", "steps")
    places |= {name: (name,) for name in names}
    found: dict[str, float | None] = {}
    for name, place in places.items():
        values = [v for run in runs if (v := number(run.summary, *place)) is not None]
        found[name] = fmean(values) if values else None
    return found


def differences(
    row: Mapping[str, Any], run: Run, baseline: Mapping[str, Any], other: Run
) -> dict[str, str]:
    """Marks (``data``, ``batch``, ``steps``, ``tokens``, ``active``, ``FLOPs``) of a row that is no
    fair comparison with the baseline's, each with its reason; ``run`` and ``other`` stand for the
    groups of the two rows.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for key in vary([run, other]):
        if kind := _kind(key):
            kinds[kind].append(f"{key} {text(value(run, key))}, not {text(value(other, key))}")
    found = {kind: "; ".join(said[:_MOST_KEYS]) for kind, said in kinds.items()}
    for kind, said in kinds.items():
        found[kind] += f"; and {len(said) - _MOST_KEYS} more" if len(said) > _MOST_KEYS else ""
    mine, theirs = row["steps"], baseline["steps"]
    if "steps" not in found and mine and theirs and mine != theirs:
        found["steps"] = f"{mine:,.0f}, not {theirs:,.0f}"
    for name, mark in _MARKS.items():
        mine, theirs = row[name], baseline[name]
        if mine and theirs and abs(mine / theirs - 1) > TOLERANCE[name]:
            found[mark] = f"{mine / theirs - 1:+.1%}"
    if "active" in found and "top_k" in run.summary and run.summary["top_k"] is None:
        found["active"] += ", every expert counted: no fixed top_k"
    return found


def sentences(found: Mapping[str, Mapping[str, str]], baseline: str) -> list[str]:
    """What `differences` found, label by label, as one sentence a mark."""
    by_mark: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for label, marks in found.items():
        for mark, reason in marks.items():
            by_mark[mark][reason].append(label)
    said = []
    for mark, reasons in by_mark.items():
        limits = [f" by more than {TOLERANCE[name]:.0%}" for name, m in _MARKS.items() if m == mark]
        which = "; ".join(f"{listed(labels)} ({why})" for why, labels in reasons.items())
        what = _WORDS.get(mark, mark)
        said.append(f"Unfair: other {what} than {baseline}{''.join(limits)}: {which}.")
    return said


def looks_ahead(runs: Iterable[Run]) -> str:
    """``no``, ``in training`` or ``in evaluation``: the worst that one of the runs says."""
    said = {run.summary.get("looks_ahead") for run in runs}
    return next((when for when in ("in evaluation", "in training") if when in said), "no")


def places(runs: Sequence[Run]) -> list[str]:
    """A sentence each if the runs are of several commits, or of several devices."""
    found = []
    commits = Counter(_commit(run) for run in runs if run.environment)
    if len(commits) > 1:
        found.append(f"The runs are of {len(commits)} commits: {_counted(commits)}.")
    devices = Counter(_device(run) for run in runs if run.environment)
    if len(devices) > 1:
        found.append(
            f"The runs are of {len(devices)} devices: {_counted(devices)}. Their tokens per second "
            "do not compare routers."
        )
    return found


def _kind(key: str) -> str | None:
    if key in _BATCH:
        return "batch"
    if key == _STEPS:
        return "steps"
    return "data" if within(key, ("data",)) else None


def _commit(run: Run) -> str:
    head, plus, changes = str(run.environment.get("commit")).partition("+")
    return head[:7] + plus + changes


def _device(run: Run) -> str:
    hardware = run.environment.get("hardware") or {}
    gpus = hardware.get("gpus")
    if not gpus:
        return str(hardware.get("cpu"))
    return " + ".join(f"{count} x {name}" for name, count in Counter(map(str, gpus)).items())


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
