"""Means over the seeds of a group of runs, step by step."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np

from routerlab.comparison.groups import Group
from routerlab.comparison.statistics import t_quantile
from routerlab.reports.figures import bin_means, running_mean
from routerlab.reports.run_files import Curve, curve


@dataclass(frozen=True)
class Band:
    """A mean over seeds at S steps [S], and half the width of its 95% t-interval [S] (None: there
    is one seed).
    """

    steps: np.ndarray
    mean: np.ndarray
    half: np.ndarray | None


def band(seeds: Sequence[Curve]) -> Band | None:
    """The mean of the seeds that have a curve, at the steps that all of these have; None where
    there are no such steps. Long curves are thinned to means of consecutive values.
    """
    logged = [seed for seed in seeds if seed]
    if not logged:
        return None
    steps = reduce(np.intersect1d, [seed.steps for seed in logged])
    if not len(steps):
        return None
    aligned = [bin_means(Curve(steps, c.values[np.isin(c.steps, steps)])) for c in logged]
    values = np.stack([c.values for c in aligned])
    half = None
    if (n := len(values)) > 1:
        half = t_quantile(n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)
    return Band(aligned[0].steps, values.mean(axis=0), half)


def bands(groups: Sequence[Group], keys: Sequence[str]) -> dict[str, dict[str, Band]]:
    """For each key the bands of the groups that logged it, by label; of running means, but for the
    keys of validations (``val/...``).
    """
    found: dict[str, dict[str, Band]] = {key: {} for key in keys}
    for group in groups:
        frames = [run.metrics(*keys) for run in group.runs]
        for key in keys:
            curves = [c for frame in frames if (c := curve(frame, key))]
            if made := band(curves if key.startswith("val/") else [*map(running_mean, curves)]):
                found[key][group.label] = made
    return found


def final_loads(run: Path) -> dict[str, np.ndarray]:
    """Each layer's shares of load [E] in the last record of them: that of the last validation, of
    the last training step where no validation has any; nothing where there are none.
    """
    path = run / "distributions.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for prefix in ("val/router/", "router/"):
        if found := _last_record(lines, prefix):
            return dict(sorted(found.items()))
    return {}


def _last_record(lines: Sequence[bytes], prefix: str) -> dict[str, np.ndarray]:
    """Read from the end, so that only a few of many lines are parsed."""
    found: dict[str, np.ndarray] = {}
    last = None
    start, end = f'"name": "{prefix}'.encode(), b'/expert_load"'
    for line in reversed(lines):
        if start not in line or end not in line:
            continue
        try:
            row = json.loads(line)
            step, name = row["step"], row["name"]
            load = np.asarray(row["value"], dtype=np.float64)
        except (ValueError, KeyError, TypeError):  # torn by a kill
            continue
        last = step if last is None else last
        if step != last:
            break
        found[name.removeprefix(prefix).removesuffix("/expert_load")] = load
    return found
