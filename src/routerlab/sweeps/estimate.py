"""What the jobs of a sweep would cost, without training them."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from routerlab.core.identity import scientific
from routerlab.sweeps.job_maker import Composer
from routerlab.sweeps.jobs import Job
from routerlab.sweeps.outcome import run_seconds

_COSTLY = ("data.", "backbone.", "trainer.")  # what decides on most of the cost of a run
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast


@dataclass(frozen=True)
class Estimate:
    """Tokens of training of all jobs (None: the data decide), their seconds one after the other
    (None: not known), and where these come from.
    """

    tokens: int | None
    seconds: float | None
    source: str


def estimate(jobs: Sequence[Job], folder: Path, threads: int | None) -> Estimate:
    """The cost of ``jobs``: from finished runs in ``folder`` with the same data, model and trainer,
    or else from a few steps of the first job that has none, on ``threads`` cores (None: this
    machine is not the one that trains them).
    """
    configs = _configs(jobs)
    tokens = [_tokens(cfg) for cfg in configs]
    known = _finished(folder)
    medians = [known.get(_costly(OmegaConf.to_container(cfg, resolve=True))) for cfg in configs]
    seconds = sum(found for found in medians if found is not None)
    sources = ["finished runs of this sweep"] if any(medians) else []
    new = [cfg for cfg, found in zip(configs, medians, strict=True) if found is None]
    if new and threads is not None:
        from routerlab.sweeps.probe import seconds_of_a_step

        step = seconds_of_a_step(new[0], threads) / _batch(new[0])
        seconds += sum(step * _batch(cfg) * cfg.trainer.max_steps for cfg in new)
        sources.append("a few training steps, without start-up and validation")
    elif new:
        return Estimate(_sum(tokens), None, "no finished run of this sweep is like these")
    return Estimate(_sum(tokens), seconds, " and ".join(sources))


def _configs(jobs: Sequence[Job]) -> list[DictConfig]:
    """The configs of jobs, which are costly to make: what they share is composed once."""
    shared = set(jobs[0].words).intersection(*(job.words for job in jobs))
    compose = Composer([word for word in jobs[0].words if word in shared])
    return [compose([word for word in job.words if word not in shared]) for job in jobs]


def _tokens(cfg: DictConfig) -> int | None:
    """Of training; None where items differ in length."""
    length = cfg.data.get("seq_len")
    return None if length is None else cfg.trainer.max_steps * cfg.data.batch_size * length


def _batch(cfg: DictConfig) -> int:
    """What the cost of a step is taken to grow with."""
    return cfg.data.batch_size * (cfg.data.get("seq_len") or 1)


def _finished(folder: Path) -> dict[str, float]:
    """The median seconds of finished runs, by what is costly in their configs."""
    found: dict[str, list[float]] = defaultdict(list)
    for path in folder.glob("*/config.yaml"):
        if (seconds := run_seconds(path.parent)) is not None:
            found[_costly(yaml.load(path.read_text(), _LOADER))].append(seconds)
    return {key: statistics.median(values) for key, values in found.items()}


def _costly(config: Any) -> str:
    """The part of a resolved config that decides on most of the cost, as text."""
    values: Mapping[str, Any] = scientific(config)
    kept = {k: v for k, v in values.items() if k.startswith(_COSTLY) and not k.endswith("seed")}
    return json.dumps(kept, sort_keys=True, default=str)


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
