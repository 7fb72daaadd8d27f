"""`RunFiles`: everything a run directory says, and notes on what it does not say.

A run may have been killed at any moment, so every reader here returns what could be read and
appends one plain sentence to the notes for what could not.
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

Distributions = dict[str, dict[int, np.ndarray]]

WATCHED_FOR_NAN = ("train/loss", "val/loss")


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run directory; a missing file is empty here and named in `notes`."""

    name: str
    metrics: pd.DataFrame  # column `step`, then one column a key; blank and non-finite are NaN
    distributions: Distributions  # name -> step -> array
    summary: dict[str, Any]
    status: dict[str, Any]
    environment: dict[str, Any]
    config: str
    overrides: str
    notes: list[str]
    baselines: dict[str, "RunFiles"] = field(default_factory=dict)  # runs to compare it with


@dataclass(frozen=True)
class Curve:
    """The logged values of one key; false when there are none."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


def read_run(run_dir: Path) -> RunFiles:
    """Everything that can be read from `run_dir`; raises only when it is not a directory."""
    if not run_dir.is_dir():
        raise NotADirectoryError(f"{run_dir} is not a run directory")
    notes: list[str] = []
    summary = _read_json(run_dir / "summary.json", notes)
    return RunFiles(
        name=str(summary.get("name") or run_dir.resolve().name),
        metrics=read_metrics(run_dir / "metrics.csv", notes),
        distributions=_read_distributions(run_dir / "distributions.jsonl", notes),
        summary=summary,
        status=_read_json(run_dir / "status.json", notes),
        environment=_read_json(run_dir / "environment.json", notes),
        config=_read_text(run_dir / "config.yaml", notes),
        overrides=_read_text(run_dir / "overrides.yaml", notes),
        notes=notes,
        baselines={
            path.parent.name: read_run(path.parent)
            for path in sorted(run_dir.glob("baselines/*/config.yaml"))
        },
    )


def curve(metrics: pd.DataFrame, key: str) -> Curve:
    """The values of one key in step order, blanks dropped; after a resume the last row counts."""
    if key not in metrics.columns:
        return Curve(np.empty(0), np.empty(0))
    steps = metrics["step"].to_numpy(dtype=np.float64)
    values = metrics[key].to_numpy(dtype=np.float64)
    logged = ~(np.isnan(steps) | np.isnan(values))
    newest_first, values = steps[logged][::-1], values[logged][::-1]
    steps, kept = np.unique(newest_first, return_index=True)
    return Curve(steps, values[kept])


def last(metrics: pd.DataFrame, key: str) -> float | None:
    """The newest value of a key, None when it was never logged."""
    logged = curve(metrics, key)
    return float(logged.values[-1]) if logged else None


def number(tree: Any, *path: str) -> float | None:
    """The finite number at a path of nested dicts, None for anything else."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else None
    if isinstance(tree, bool) or not isinstance(tree, int | float) or not math.isfinite(tree):
        return None
    return float(tree)


def section(tree: Any, *path: str) -> dict[str, Any]:
    """The dict at a path of nested dicts, empty for anything else."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _read_text(path: Path, notes: list[str]) -> str:
    """The text of a file; bytes that are not UTF-8 become replacement characters."""
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _read_text(path, notes)
    if not path.is_file():
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        notes.append(f"{path.name} is not valid JSON ({error}).")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds no JSON object.")
        return {}
    return value


def _whole_bytes(path: Path, notes: list[str]) -> bytes:
    """A file up to its last newline: a kill can cut the last line, and a cut number lies."""
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return b""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        notes.append(f"The last line of {path.name} was torn off while being written; ignored.")
    return whole


def read_metrics(path: Path, notes: list[str], keys: Sequence[str] | None = None) -> pd.DataFrame:
    """Column ``step`` and one column a key (of ``keys`` only, if given, those that were logged);
    blank and non-finite are NaN. Lines that were not wholly written are left out.
    """
    data = _whole_bytes(path, notes)
    names = logged_keys(data)
    if "step" not in names:
        if names:
            notes.append(f"{path.name} has no column named step; ignored.")
        return pd.DataFrame({"step": pd.Series(dtype=float)})
    wanted = names if keys is None else ["step", *(k for k in keys if k in names and k != "step")]
    try:
        raw = _parse_csv(data, wanted, pa.float64())
        columns = {key: raw[key].to_numpy() for key in wanted}
    except pa.ArrowInvalid:  # some cell is no number
        raw = _parse_csv(data.decode("utf-8", "replace").encode(), wanted, pa.string())
        columns = {k: pd.to_numeric(raw[k].to_pandas(), errors="coerce") for k in wanted}
    frame = pd.DataFrame(columns, dtype=np.float64).replace([np.inf, -np.inf], np.nan)
    notes.extend(_divergence_notes(raw, frame))
    return frame.dropna(subset=["step"])


def logged_keys(data: bytes) -> list[str]:
    """The columns that the first line of ``metrics.csv`` names."""
    line = data[: data.find(b"\n")] if b"\n" in data else b""
    return [name for name in next(csv.reader([line.decode("utf-8", "replace")]), []) if name]


def _parse_csv(data: bytes, wanted: Sequence[str], dtype: pa.DataType) -> pa.Table:
    # Blank means "not logged"; the word nan means the run diverged. Only the first is no news.
    return pyarrow.csv.read_csv(
        pa.BufferReader(data),
        parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=lambda _: "skip"),
        convert_options=pyarrow.csv.ConvertOptions(
            null_values=[""],
            strings_can_be_null=True,
            include_columns=list(wanted),
            column_types=dict.fromkeys(wanted, dtype),
        ),
    )


def _divergence_notes(raw: pa.Table, frame: pd.DataFrame) -> list[str]:
    """One sentence for each watched key that was logged as nan or infinite."""
    notes = []
    for key in WATCHED_FOR_NAN:
        if key not in frame:
            continue
        diverged = raw[key].is_valid().to_numpy() & frame[key].isna().to_numpy()
        steps = frame["step"].to_numpy()[diverged]
        if len(steps):
            where = f"{len(steps)} rows, first at step {np.nanmin(steps):g}"
            notes.append(f"{key} is not finite in {where}.")
    return notes


def _read_distributions(path: Path, notes: list[str]) -> Distributions:
    found: Distributions = {}
    unreadable = 0
    for line in _whole_bytes(path, notes).decode("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
            value = np.asarray(row["value"], dtype=np.float64)
            found.setdefault(str(row["name"]), {})[int(row["step"])] = value
        except (ValueError, KeyError, TypeError):
            unreadable += bool(line.strip())
    if unreadable:
        notes.append(f"{unreadable} lines of {path.name} could not be read; ignored.")
    return found
