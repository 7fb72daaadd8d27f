"""Finished runs side by side."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import pandas as pd

_NOT_RESULTS = ("run_dir", "resume", "paths.", "logger.", "callback.")


def compare(paths: Iterable[str | Path]) -> "pd.DataFrame":
    """One row a run, by directory name: its state, the config keys in which the runs differ,
    whether its routing looks at later tokens (``looks_ahead``: a run that does so in evaluation
    leaks the future), and its headline numbers (validation, load and entropy means, speed,
    parameters).

    A run without a summary (still running, or failed) has its state and config, and no numbers.
    """
    import pandas as pd  # here, because a training run reads this module and needs no tables

    rows, configs = {}, {}
    for path in map(Path, paths):
        if not (path / "config.yaml").is_file():
            raise ValueError(f"{str(path)!r} holds no run (it has no config.yaml)")
        name = path.name if path.name not in rows else str(path)
        configs[name] = flat(yaml.safe_load((path / "config.yaml").read_text()))
        rows[name] = _headline(path)
    keys = sorted({key for config in configs.values() for key in config})
    values = {key: {str(config.get(key)) for config in configs.values()} for key in keys}
    differing = [k for k in keys if len(values[k]) > 1 and not k.startswith(_NOT_RESULTS)]
    for name, row in rows.items():
        rows[name] = {key: configs[name].get(key) for key in differing} | row
    return pd.DataFrame.from_dict(rows, orient="index")


def _headline(path: Path) -> dict[str, Any]:
    summary, status = _json(path / "summary.json"), _json(path / "status.json")
    row: dict[str, Any] = {"state": status.get("state"), "looks_ahead": summary.get("looks_ahead")}
    row |= {f"val/{k}": v for k, v in summary.get("val", {}).items() if not isinstance(v, dict)}
    layers = summary.get("layers", [])
    for key in layers[0] if layers else ():
        if key != "layer":
            row[f"router/mean/{key}"] = sum(layer[key] for layer in layers) / len(layers)
    row |= {k: summary[k] for k in ("steps", "tokens", "tokens_per_second") if k in summary}
    row |= {f"parameters/{k}": v for k, v in summary.get("parameters", {}).items()}
    return row


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as one level of dotted keys."""
    if not isinstance(node, dict):
        return {prefix.removesuffix("."): node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}{key}.").items()}
