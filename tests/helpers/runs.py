"""Run directories as a finished run leaves them, without training."""

import csv
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from routerlab.core.config import choices, compose

Rows = Sequence[Mapping[str, float]]
_START = datetime(2026, 1, 1, tzinfo=UTC)


def finished_run(
    path: Path,
    words: Sequence[str] = (),
    *,
    bits: float | None = 2.5,
    state: str = "done",
    minutes: float = 0,
    rows: Rows = (),
    config: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Leaves in ``path`` the files of a run of these ``words`` (``router=hash``, ``seed=1``).

    ``bits`` per byte at the end (None: no summary yet); ``minutes`` after the others it came into
    its ``state``; ``rows`` of metrics.csv; dotted keys of ``config``, and keys of ``summary`` and
    ``environment``, replace those that a run has.
    """
    path.mkdir(parents=True)
    values = [word for word in words if "." in word.split("=")[0] or word.startswith("seed=")]
    plain, chosen = _composed(tuple(word for word in words if word not in values))
    cfg = OmegaConf.merge(plain, OmegaConf.from_dotlist(values))
    for key, value in {"data.seed": cfg.seed, **(config or {})}.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (path / "choices.yaml").write_text(yaml.safe_dump(dict(chosen)))
    (path / "overrides.yaml").write_text(yaml.safe_dump(list(words)))
    at = (_START + timedelta(minutes=minutes)).isoformat()
    (path / "status.json").write_text(json.dumps({"state": state, "at": at}))
    (path / "environment.json").write_text(json.dumps(_ENVIRONMENT | dict(environment or {})))
    if bits is not None:
        whole = _SUMMARY | {"name": path.name, "val": {"loss": bits * 0.7, "bits_per_byte": bits}}
        (path / "summary.json").write_text(json.dumps(whole | dict(summary or {})))
    write_metrics(path, rows or _rows(bits or 2.5))
    return path


def write_metrics(path: Path, rows: Rows) -> None:
    """``metrics.csv`` as a run writes it: a row a call, blank where a key was not logged."""
    columns = ["step", *dict.fromkeys(key for row in rows for key in row if key != "step")]
    with (path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = {k: repr(float(v)) for k, v in row.items() if k != "step"}
            writer.writerow({"step": int(row["step"])} | values)


def _rows(bits: float) -> Rows:
    train = [
        {"step": s, "train/loss": 4 - 0.5 * s, "router/mean/load_entropy": 0.9} for s in (1, 2)
    ]
    return [*train, {"step": 2, "val/loss": bits * 0.7, "val/bits_per_byte": bits}]


@functools.cache
def _composed(words: tuple[str, ...]) -> tuple[Any, dict[str, str]]:
    return OmegaConf.to_container(compose(*words), resolve=True), choices(words)


_ENVIRONMENT = {
    "python": "3.11.7",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "hardware": {"cpu": "some processor", "cores": 2, "memory_gib": 8.0, "gpus": []},
}
_SUMMARY = {
    "steps": 4,
    "tokens": 1024,
    "train_seconds": 0.5,
    "tokens_per_second": 2048.0,
    "parameters": {"total": 47584, "active": 35296, "trainable": 47584, "experts": 8},
    "looks_ahead": "no",
    "baselines": {"unigram": 4.7, "bigram": 3.8, "trigram": 3.0},
    "domains": ["prose", "code"],
    "num_experts": [4],
    "top_k": 2,
    "layers": [{"layer": "layers.00", "load_entropy": 0.97, "dead_experts": 0.0}],
}
