"""Runs as a table of pandas, for notebooks."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from routerlab.comparison.groups import vary
from routerlab.comparison.runs import BrokenRunError, Run, load_run, short_names
from routerlab.core.identity import scientific

_COST = ("steps", "tokens", "tokens_per_second", "flops_per_token")


def compare(paths: Iterable[str | Path]) -> pd.DataFrame:
    """One row a run, by directory name: its state, the config keys in which the runs differ,
    whether its routing looks at later tokens (``looks_ahead``: a run that does so in evaluation
    leaks the future), and its headline numbers (validation, load and entropy means, speed,
    parameters).

    A run without a summary (still running, or failed) has its state and config, and no numbers.
    A broken one is left out with a warning; raises ``ValueError`` for a path that holds no run.
    """
    folders = list(dict.fromkeys(Path(path).expanduser().resolve() for path in paths))
    runs = []
    for folder, name in zip(folders, short_names(folders), strict=True):
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{str(folder)!r} holds no run (it has no config.yaml)")
        try:
            runs.append(load_run(folder, name))
        except BrokenRunError as error:
            warnings.warn(f"{folder} is left out: {error}", stacklevel=2)
    keys = sorted({key for run in runs for key in scientific(run.config)})
    differing = vary(runs, keys)
    rows = {
        run.name: {key: run.config.get(key) for key in differing} | _headline(run) for run in runs
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _headline(run: Run) -> dict[str, Any]:
    summary = run.summary
    row: dict[str, Any] = {"state": run.state, "looks_ahead": summary.get("looks_ahead")}
    row |= {f"val/{k}": v for k, v in summary.get("val", {}).items() if not isinstance(v, dict)}
    layers = summary.get("layers", [])
    for key in layers[0] if layers else ():
        if key != "layer":
            row[f"router/mean/{key}"] = fmean(layer[key] for layer in layers)
    row |= {k: summary[k] for k in _COST if k in summary}
    row |= {f"parameters/{k}": v for k, v in summary.get("parameters", {}).items()}
    return row
