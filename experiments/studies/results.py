"""Run directories to one row of numbers each."""

import csv
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from routerlab.core.identity import flat

from .definition import Study

Row = dict[str, Any]
HEADLINES = ("bits_per_byte", "accuracy")
FIRST = ["arm", "seed", "state", "looks_ahead", *HEADLINES]
_LEAST_SUPPORT = re.compile(r"router/(?!mean/).*/probs_ess_min")  # of any token in training
_OF_RUN = ("seed", "data.seed", "backbone.seed", "run_dir", "adapter.adapt_from", "init_from")
_SHARED = ("data.", "trainer.", "optimizer.")  # what arms must agree in, unless they say otherwise


def collect(study: Study, seeds: Sequence[int] | None, output: Path) -> list[Row]:
    """A row for each arm and seed: arms in the study's order. Seeds: those that were run.

    ``ValueError`` where runs cannot be compared (see `check_comparable`), or where there are none.
    """
    seeds = sorted(set(_seeds(study, output))) if seeds is None else seeds
    places = [
        (arm, seed, study.run_path(output, arm, seed)) for arm in study.arms for seed in seeds
    ]
    if not any((path / "summary.json").is_file() for *_, path in places):
        raise ValueError(
            f"no finished runs in {output / study.name}; first: study.py run {study.name}"
        )
    check_comparable(study, [(arm, path) for arm, _, path in places])
    return [{"arm": arm, "seed": seed} | read_run(path) for arm, seed, path in places]


def read_run(path: Path) -> Row:
    """The numbers of one run; without a summary only its state and, if it failed, why.

    Router metrics are means over layers, on held-out text. ``step_seconds`` is the median over
    training, on a machine that other runs share. ``avg_max_violation`` and ``sup_max_violation``
    are the mean and the maximum over the logged training steps, averaged over layers (AvgMaxVio and
    SupMaxVio of arXiv 2502.15451; that layers are averaged is our reading).
    """
    summary, status = read_json(path / "summary.json"), read_json(path / "status.json")
    if status.get("state") != "done":
        state = status.get("state", "failed" if (path / "job.log").is_file() else "")
        return {"state": state or "missing", "error": error_of(path) if state == "failed" else ""}
    rows = read_metrics(path)
    layers = summary["layers"]
    found: Row = {"state": "done", "looks_ahead": summary["looks_ahead"]}
    found |= {k: summary["val"][k] for k in (*HEADLINES, "loss") if k in summary["val"]}
    found |= {f"accuracy_of_{k}": v["accuracy"] for k, v in _by_task(summary).items()}
    if summary.get("base"):
        found["base_accuracy"] = summary["base"]["accuracy"]
    if aligned := summary.get("alignment"):
        found |= {f"distance_{when}": aligned[when]["distance"] for when in ("before", "after")}
        found["distance_ratio"] = found["distance_after"] / (found["distance_before"] or 1.0)
        found["routing_similarity"] = aligned["after"]["similarity"]
    found |= _of_last(rows, "val/router/mean/")  # of the curve: some are not in the summary
    metrics = layers[0].keys() - {"layer"} if layers else ()
    found |= {k: _mean(layer[k] for layer in layers) for k in metrics}
    if support := [v for row in rows for k, v in row.items() if _LEAST_SUPPORT.fullmatch(k)]:
        found["lowest_probs_ess"] = min(support)
    coupling = _of_last(rows, "loss/expert_router_coupling/")  # its probe, at the last logged step
    found |= {f"coupling_{k}": v for k, v in coupling.items() if k != "weighted"}
    found |= _violations(rows)
    speeds = [row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row]
    per_step = summary["tokens"] / summary["steps"]
    if speeds:
        found["step_seconds"] = statistics.median(per_step / speed for speed in speeds)
    found |= {key: summary[key] for key in ("steps", "tokens", "train_seconds")}
    found["total_parameters"] = summary["parameters"]["total"]
    found["active_parameters"] = _active(path, summary)
    if "trainable" in summary["parameters"]:
        found["trainable_parameters"] = summary["parameters"]["trainable"]
    return found


def _by_task(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = summary["val"].get("by_task", {})
    return found if len(found) > 1 else {}


def check_comparable(study: Study, runs: Iterable[tuple[str, Path]]) -> None:
    """Refuses runs of one arm whose configs differ in more than the seed, and arms that differ in
    data, trainer or optimizer where their overrides do not say so.
    """
    first: dict[str, Any] | None = None
    of_arm: dict[str, dict[str, Any]] = {}
    for arm, path in runs:
        if not (path / "config.yaml").is_file():
            continue
        config = flat(yaml.safe_load((path / "config.yaml").read_text()))
        config = {k: v for k, v in config.items() if k not in _OF_RUN}
        wrong = _differing(of_arm.setdefault(arm, config), config)
        if arm not in study.compared:
            continue
        first = first or config
        said = [word.split("=")[0].lstrip("+~") for word in study.arms[arm]]
        wrong += [
            key
            for key in _differing(first, config)
            if key.startswith(_SHARED)
            and not any(key == word or key.startswith(f"{word}.") for word in said)
        ]
        if wrong:
            raise ValueError(
                f"{path} cannot be compared with the other runs: it differs in {', '.join(wrong)}"
            )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a run, the headline first and the rest by name."""
    keys = {key for row in rows for key in row}
    columns = [*FIRST, *sorted(keys - {*FIRST, "error"}), "error"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv, as far as they hold numbers."""
    if not (path / "metrics.csv").is_file():
        return []
    with (path / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it is not there."""
    return json.loads(path.read_text()) if path.is_file() else {}


def error_of(path: Path) -> str:
    """Why a run failed, in a line: from its status, or else the last line that it printed."""
    if error := read_json(path / "status.json").get("error"):
        return error.splitlines()[0]
    log = path / "job.log"
    lines = log.read_text().strip().splitlines() if log.is_file() else []
    return next((ln for ln in reversed(lines) if "rror" in ln), lines[-1] if lines else "no log")


def _violations(rows: Sequence[dict[str, float]]) -> Row:
    by_layer: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if re.fullmatch(r"router/layers\.\d+/max_violation", key):
                by_layer.setdefault(key, []).append(value)
    if not by_layer:
        return {}
    return {
        "avg_max_violation": _mean(map(statistics.fmean, by_layer.values())),
        "sup_max_violation": _mean(map(max, by_layer.values())),
    }


def _of_last(rows: Sequence[dict[str, float]], prefix: str) -> Row:
    last = next((row for row in reversed(rows) if any(k.startswith(prefix) for k in row)), {})
    return {k.removeprefix(prefix): v for k, v in last.items() if k.startswith(prefix)}


def _active(path: Path, summary: dict[str, Any]) -> int:
    """Parameters that a token meets; by the measured number of experts where it is not fixed."""
    parameters, layers = summary["parameters"], summary["layers"]
    in_part = parameters.get("trainable", parameters["total"]) < parameters["total"]
    known = not layers or "experts_per_token" not in layers[0] or in_part
    if parameters["active"] < parameters["total"] or known:
        return parameters["active"]
    from omegaconf import OmegaConf

    from routerlab.training.build import build_backbone

    backbone: Any = build_backbone(OmegaConf.load(path / "config.yaml"))  # pyright: ignore
    idle = 0.0
    for layer, moe in zip(layers, backbone.moe_layers.values(), strict=True):
        every = sum(p.numel() for p in moe.experts.parameters())
        idle += every * (1 - layer["experts_per_token"] / moe.experts.num_experts)
    return round(parameters["total"] - idle)


def _seeds(study: Study, output: Path) -> list[int]:
    found = (output / study.name).glob("*/seed_*")
    return [int(p.name.removeprefix("seed_")) for p in found if p.name[5:].isdigit()]


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
