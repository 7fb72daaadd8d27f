"""A fine-tuning run of made-up numbers, with a baseline beside it."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = [f"layers.{i:02d}.mlp.up_proj" for i in range(4)]
TASKS = ["sarcasm", "<i>sums</i>"]
STEPS, EVERY = 60, 20
SUPPORT = [f"{kind}_{part}" for kind in ("ess", "probs_ess") for part in ("mean", "p05", "min")]
POLICY = ("grad_norm", "grad_variance", "snr", "loss_std", "loss_range")


def write_tuned(path: Path, layers: list[str] = LAYERS) -> Path:
    """A finished mixture with a finished LoRA."""
    _write(path, layers, 0.83)
    _write(path / "baselines" / "lora", [], 0.79)
    others = {"lora": scores(0.79) | {"parameters": {"trainable": 43210}, "train_seconds": 9.0}}
    about = json.loads((path / "summary.json").read_text())
    about |= {"base": scores(0.52), "baselines": others}
    (path / "summary.json").write_text(json.dumps(about))
    return path


def scores(accuracy: float) -> dict[str, Any]:
    """What a validation of 200 items gives."""
    found = {
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.05,
        "accuracy_high": accuracy + 0.04,
    }
    tasks = {task: found | {"accuracy": accuracy + 0.01 * i, "items": 100}
             for i, task in enumerate(TASKS)}  # fmt: skip
    return found | {"loss": 1.1 - accuracy, "items": 200, "by_task": tasks}


def _write(path: Path, layers: list[str], accuracy: float) -> None:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("seed: 1\n")
    (path / "overrides.yaml").write_text("- adapter=remix\n")
    (path / "environment.json").write_text('{"commit": "abc"}')
    (path / "status.json").write_text('{"state": "done"}')
    (path / "distributions.jsonl").write_text("")
    row = {"dead_experts": 0, "load_entropy": 0.9, "ess_mean": 4.0, "probs_ess_mean": 2.5}
    about = {
        "name": path.name,
        "steps": STEPS,
        "tokens": 12_000,
        "train_seconds": 61.0,
        "parameters": {"total": 135_000_000, "active": 134_500_000, "trainable": 987_654},
        "looks_ahead": "no",
        "val": scores(accuracy),
        "base": None,
        "baselines": {},
        "domains": TASKS,
        "layers": [{"layer": layer} | row for layer in layers],
    }
    (path / "summary.json").write_text(json.dumps(about))
    rng = np.random.default_rng(0)
    rows = [_train_row(step, layers, rng) for step in range(1, STEPS + 1)]
    rows += [_val_row(step, layers, accuracy) for step in range(EVERY, STEPS + 1, EVERY)]
    keys = dict.fromkeys(["step", *(key for row in rows for key in row)])
    with (path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(keys))
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["step"]))


def _train_row(step: int, layers: list[str], rng: np.random.Generator) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "train/loss": 2 / step**0.5 + rng.normal(0, 0.05)}
    row |= {"train/grad_norm": 1 + rng.random(), "train/learning_rate": 1e-3}
    if layers:
        row |= {f"policy/{name}": rng.random() for name in POLICY}
    return row | _support(step, layers, "router")


def _val_row(step: int, layers: list[str], accuracy: float) -> dict[str, Any]:
    share = accuracy - 0.2 + 0.2 * step / STEPS
    row = {"step": step, "val/loss": 1.1 - share, "val/accuracy": share}
    row |= {"val/accuracy_low": share - 0.1, "val/accuracy_high": share + 0.08}
    return row | _support(step, layers, "val/router")


def _support(step: int, layers: list[str], prefix: str) -> dict[str, Any]:
    row = {}
    for depth, layer in enumerate(layers):
        soft = 8 - 6 * step / STEPS + 0.1 * depth
        values = [4.0, 4.0, 4.0, soft, soft - 0.5, max(1.0, soft - 1.5)]
        row |= {f"{prefix}/{layer}/{n}": v for n, v in zip(SUPPORT, values, strict=True)}
    for name in SUPPORT if layers else ():
        found = [row[f"{prefix}/{layer}/{name}"] for layer in layers]
        row[f"{prefix}/mean/{name}"] = sum(found) / len(found)
    return row
