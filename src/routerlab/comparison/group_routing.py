"""Groups of runs compared by what their routers decided on the same tokens."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from routerlab.comparison.curves import Band, band
from routerlab.comparison.groups import Group
from routerlab.comparison.routing import LayerAgreement, agreement, routing_history
from routerlab.comparison.runs import Run
from routerlab.reports.figures import thinned
from routerlab.reports.run_files import Curve

if TYPE_CHECKING:
    from routerlab.analysis.trace import Trace

MOST_SEEDS = 3  # of a group
MOST_VALIDATIONS = 40  # of a run
_MOST_LAYERS = 300  # over all pairs of runs: a layer takes a hundredth of a second

Reasons = dict[str, list[str]]  # why something is missing -> what it is missing for


@dataclass(frozen=True)
class Agreements:
    """How far groups of runs agree on who does what.

    ``cells[label, other]`` (both ways round) are the layers of each pair of runs that was compared:
    of two groups, their runs of the first seed that both have; of a group with itself, its first
    seeds two by two. ``most_layers``: only so many layers were compared, where there are more.
    """

    cells: dict[tuple[str, str], list[list[LayerAgreement]]]
    missing: Reasons
    most_layers: int | None

    def above_chance(self, label: str, other: str) -> float:
        """The mean over layers and pairs of runs; NaN where nothing was compared."""
        layers = [layer for pair in self.cells.get((label, other), []) for layer in pair]
        return mean([layer.above_chance for layer in layers])


def agreements(groups: Sequence[Group]) -> Agreements:
    """What there is to say of the groups that have traces."""
    pairs = list(_pairs(groups))
    kept = _Traces(most_layers=max(2, _MOST_LAYERS // max(1, len(pairs))))
    cells: dict[tuple[str, str], list[list[LayerAgreement]]] = {}
    missing: Reasons = defaultdict(list)
    for label, other, runs in pairs:
        try:
            found = kept.agreement(*runs)
        except ValueError as error:
            missing[str(error)].append(f"{label} – {other}" if label != other else label)
            continue
        for key in {(label, other), (other, label)}:
            cells.setdefault(key, []).append(found)
    missing = {reason: list(dict.fromkeys(names)) for reason, names in missing.items()}
    return Agreements(cells, missing, kept.most_layers if kept.has_thinned else None)


def histories(groups: Sequence[Group]) -> tuple[dict[str, dict[str, Band]], Reasons]:
    """Bands over the first seeds of ``churn`` and ``saturation`` (means over layers), by label; and
    what some runs lack.
    """
    found: dict[str, dict[str, Band]] = {"churn": {}, "saturation": {}}
    missing: Reasons = defaultdict(list)
    for group in groups:
        seeds = []
        for run in group.runs[:MOST_SEEDS]:
            try:
                seeds.append(routing_history(_directory(run), MOST_VALIDATIONS))
            except ValueError as error:
                missing[str(error)].append(f"{group.label}, seed {run.seed}")
        for name, by_label in found.items():
            if made := band([_curve(seed.steps, getattr(seed, name)) for seed in seeds]):
                by_label[group.label] = made
    return found, dict(missing)


def mean(values: Sequence[float]) -> float:
    """Of the values that are numbers; NaN where none is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _pairs(groups: Sequence[Group]) -> Iterator[tuple[str, str, tuple[Run, Run]]]:
    for place, group in enumerate(groups):
        for pair in combinations(group.runs[:MOST_SEEDS], 2):
            yield group.label, group.label, pair
        runs = {run.seed: run for run in group.runs}
        for other in groups[place + 1 :]:
            common = next((run for run in other.runs if run.seed in runs), None)
            if common is not None:
                yield group.label, other.label, (runs[common.seed], common)


class _Traces:
    """The final traces of runs, each read once and thinned to some layers: they can be large."""

    def __init__(self, most_layers: int) -> None:
        self.most_layers, self.has_thinned = most_layers, False
        self._known: dict[Run, tuple[Trace, int]] = {}

    def agreement(self, one: Run, other: Run) -> list[LayerAgreement]:
        """As `routing.agreement`; raises ``ValueError`` as it does."""
        (a, depth), (b, other_depth) = self._read(one), self._read(other)
        if depth != other_depth:
            raise ValueError(f"{depth} and {other_depth} layers with routers")
        return agreement(a, b)

    def _read(self, run: Run) -> "tuple[Trace, int]":
        from routerlab.analysis import trace

        if run not in self._known:
            if not (_directory(run) / "traces" / "validation.safetensors").is_file():
                raise ValueError("no recorded routing (trace_sequences=0)")
            full = trace.load(_directory(run))
            names = thinned(list(full.layers), self.most_layers)
            few = dataclasses.replace(full, layers={name: full.layers[name] for name in names})
            self._known[run] = few, len(full.layers)
            self.has_thinned |= len(full.layers) > len(names)
        return self._known[run]


def _directory(run: Run) -> Path:
    if run.path is None:
        raise ValueError("it came from W&B, which has no recorded routing")
    return run.path


def _curve(steps: Sequence[int], values: np.ndarray) -> Curve:
    """Means over layers [S or S-1] at the steps that they belong to: the last ones."""
    means = np.array([mean(row) for row in values.tolist()])
    known = ~np.isnan(means)
    return Curve(np.array(steps[-len(values) :], dtype=float)[known], means[known])
