"""Where numbers go: plain files in the run directory, and Weights & Biases."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from routerlab.core.config import ConfigError
from routerlab.core.identity import PLACES, within
from routerlab.core.instantiate import locate, partial
from routerlab.training.run_directory import RunDirectory
from routerlab.training.tracking import BEST
from routerlab.training.weights_and_biases import Wandb, check_settings

Distributions = Mapping[str, list]


def check_loggers(cfg: DictConfig) -> None:
    """Refuses what a tracker would refuse once training runs."""
    for name, node in (cfg.get("logger") or {}).items():
        if not issubclass(locate(node["_target_"]), Wandb):
            continue
        settings = {key: node.get(key) for key in ("project", "entity", "max_keys") if key in node}
        try:
            check_settings(**{"entity": None, "max_keys": 1} | settings, group=cfg.get("group"))
        except ValueError as error:
            key = "" if str(error).startswith("group=") else f"logger.{name}."
            raise ConfigError(f"{key}{error}") from error


def build_loggers(cfg: DictConfig, run: RunDirectory, ahead: str) -> list[Any]:
    """The loggers of a config; ``ahead``: whether its routing looks at later tokens, and when.

    Each gets the run's directory, its config (with the chosen files under ``choices``), the group
    of its sweep, its router as ``job_type``, and tags: its own and the words of the command line.
    """
    chosen = run.choices
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    tags = [*([f"looks ahead {ahead}"] if ahead != "no" else []), *_short(run.overrides)]
    shared = {
        "directory": run.path,
        "config": config | {"choices": chosen},
        "group": cfg.get("group"),
        "job_type": chosen.get("router", "no router"),
    }
    nodes = (cfg.get("logger") or {}).values()
    return [partial(node)(**shared, tags=[*(node.get("tags") or []), *tags]) for node in nodes]


def log_headline(loggers: Sequence[Logger], run: RunDirectory) -> None:
    """Sends the headline of a finished run, and its best values by ``metrics.csv``, to W&B."""
    rows = MetricsFiles(run.path).rows()
    seen = {key: [float(row[key]) for row in rows if row.get(key)] for key in BEST}
    choose = {"min": min, "max": max}
    best = {key: choose[BEST[key]](values) for key, values in seen.items() if values}
    for logger in loggers:
        if isinstance(logger, Wandb):
            logger.log_headline(run.read_json("summary.json"), best)


def _short(overrides: list[str]) -> list[str]:
    """The words that say what a run computes, without those that say where."""
    words = [word.lstrip("+~") for word in overrides if "/" not in word]
    return [word for word in words if not within(word.split("=")[0], PLACES)]


class MetricsFiles(Logger):
    """``metrics.csv`` (a row a step, a column a scalar) and ``distributions.jsonl`` (the rest).

    Every row is written when the call returns. A resumed run first forgets what came after its
    checkpoint (`rewind`), so that recomputed steps appear once.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.metrics, self.distributions = (
            directory / "metrics.csv",
            directory / "distributions.jsonl",
        )
        self._columns: list[str] = []
        if self.metrics.is_file():
            with self.metrics.open(newline="") as file:
                self._columns = next(csv.reader(file), [])

    @property
    def name(self) -> str:
        """``files``."""
        return "files"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory holds the whole config."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends a row; a scalar not seen before adds a column to the whole file."""
        new = [key for key in metrics if key not in self._columns]
        if new:
            rows = self.rows()
            self._columns = [*(self._columns or ["step"]), *new]
            self._rewrite(rows)
        with self.metrics.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writerow({"step": step} | {k: repr(float(v)) for k, v in metrics.items()})

    @rank_zero_only
    def log_distributions(self, distributions: Distributions, step: int) -> None:
        """Appends one JSON object a line: step, name, value (nested lists)."""
        with self.distributions.open("a") as file:
            for name, value in distributions.items():
                file.write(json.dumps({"step": step, "name": name, "value": value}) + "\n")

    def rows(self) -> list[dict[str, str]]:
        """The whole rows of ``metrics.csv``; a line torn by a crash is left out."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        return [row for row in csv.DictReader(whole) if None not in row.values()]

    def has(self, step: int, key: str) -> bool:
        """Whether ``key`` has a value at ``step``."""
        return any(row["step"] == str(step) and row.get(key) for row in self.rows())

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forgets everything after optimizer step ``step``."""
        if not self.metrics.is_file():
            return
        self._rewrite([row for row in self.rows() if int(row["step"]) <= step])
        if self.distributions.is_file():
            lines = self.distributions.read_text().splitlines(keepends=True)
            kept = [ln for ln in lines if ln.endswith("\n") and json.loads(ln)["step"] <= step]
            _replace(self.distributions, "".join(kept))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        scratch = self.metrics.with_suffix(".tmp")
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        scratch.replace(self.metrics)


def _replace(path: Path, text: str) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.replace(path)
