"""What a training step of each arm costs: all arms in one process, taking turns."""

import csv
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from routerlab.bench.timing import Ratio, interleave
from routerlab.core.config import compose
from routerlab.training import assemble

from .definition import Study
from .results import read_json


class Steps:
    """Training steps of one arm on batches of its data, without a Trainer around them.

    ``weights``: ``trained`` if a finished run of ``path`` gave them (a router that chooses how many
    experts it uses costs what it learned to), else ``fresh``.
    """

    def __init__(self, cfg: Any, data: Any, path: Path | None = None) -> None:
        torch.manual_seed(cfg.seed)
        self.objective: Any = assemble.build_objective(cfg, data)
        self.weights = "fresh"
        saved = sorted((path / "checkpoints").glob("step_*.ckpt")) if path else []
        if path and saved and read_json(path / "status.json").get("state") == "done":
            state = torch.load(saved[-1], weights_only=True, map_location="cpu")["state_dict"]
            self.objective.load_state_dict(state)
            self.weights = "trained"
        optimizer, schedule = self.objective.recipe.build(self.objective, cfg.trainer.max_steps)
        self.objective.optimizers = lambda: optimizer
        self.objective.lr_schedulers = lambda: schedule
        self.objective.log_every = sys.maxsize  # the router's cost, without the diagnostics'
        self.objective.train()

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """One optimizer step; its loss."""
        return float(self.objective.training_step(batch, 0)["loss"])


def build_arms(
    study: Study, words: list[str], output: Path | None = None
) -> tuple[dict[str, "Steps | Exception"], Iterator[dict[str, torch.Tensor]]]:
    """Every arm, ready to step (or why it cannot), and the batches for all of them.

    ``words`` are added to the overrides of every arm.
    """
    assemble.quiet()
    data = assemble.build_data(compose(*study.words(study.baseline), *words))
    arms: dict[str, Steps | Exception] = {}
    for arm in study.arms:
        if study.sources(arm):
            arms[arm] = ValueError("starts from another arm's run")
            continue
        path = study.run_path(output, arm, 0) if output else None
        try:
            arms[arm] = Steps(compose(*study.words(arm), *words), data, path)
        except (ValueError, RuntimeError) as error:
            arms[arm] = error
    return arms, iter(data.train_dataloader())


def check(study: Study, words: list[str]) -> dict[str, str]:
    """Why arms cannot take a training step; empty if all can."""
    arms, batches = build_arms(study, words)
    wrong = {
        arm: str(steps)
        for arm, steps in arms.items()
        if isinstance(steps, Exception) and not study.sources(arm)
    }
    for arm, steps in arms.items():
        if isinstance(steps, Steps):
            try:
                steps.step(next(batches))
            except (ValueError, RuntimeError) as error:
                wrong[arm] = str(error)
    return wrong


def measure(study: Study, output: Path, seconds: float) -> tuple[dict[str, Ratio], list[list[str]]]:
    """The cost of each arm's step over the baseline's, and the lines of step_time.csv.

    CPU seconds of one thread, so that other processes matter little; a sample stands between two of
    the baseline, and all see a new batch.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        arms, batches = build_arms(study, [], output)
        ready = {arm: steps for arm, steps in arms.items() if isinstance(steps, Steps)}
        for arm in arms.keys() - ready.keys():
            print(f"{arm}: not timed, {arms[arm]}", file=sys.stderr)
        batch: dict[str, Any] = {}

        def work(steps: Steps) -> Any:
            return lambda: steps.step(batch)

        found, base = interleave(
            {arm: work(steps) for arm, steps in ready.items() if arm != study.baseline},
            work(ready[study.baseline]),
            lambda: batch.update(next(batches)),
            seconds,
            clock=time.process_time,
        )
    finally:
        torch.set_num_threads(threads)
    lines = [["arm", "ratio", "lower", "upper", "milliseconds", "samples", "weights"]]
    weights = ready[study.baseline].weights
    lines.append([study.baseline, "1", "1", "1", f"{base:.2f}", "", weights])
    for arm, r in found.items():
        numbers = [f"{v:.4f}" for v in (r.median, r.lower, r.upper)]
        lines.append([arm, *numbers, f"{r.milliseconds:.2f}", str(r.samples), ready[arm].weights])
    return found, lines


def read_times(path: Path) -> Mapping[str, float]:
    """The ratios of a step_time.csv, by arm; empty if there is none."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {row["arm"]: float(row["ratio"]) for row in csv.DictReader(file)}
