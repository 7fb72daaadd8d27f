"""Seconds from the launch of `routerlab train` to the end of its first optimizer step."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from routerlab.bench.layer import Settings
from routerlab.bench.running import routerlab

GOAL = 8.0  # seconds
_ROUNDS = 3
_IMPORTS = "import hydra, wandb, routerlab.training.train"
_MARKS = ("built", "set up", "stepped")  # of `FirstStep`
_CALLBACK = "routerlab.bench.first_step.FirstStep"


@dataclass(frozen=True, slots=True)
class StartUp:
    """Seconds of fresh processes: the median, least and most of the whole, and medians of its
    parts. ``imports`` is a process that only imports, and a part of ``before_run``: everything
    until data and model are there and checked.
    """

    seconds: float
    least: float
    most: float
    imports: float
    before_run: float
    run_and_loggers: float
    first_step: float
    processes: int
    goal: float = GOAL

    @property
    def met(self) -> bool:
        """Whether the median is within the goal."""
        return self.seconds <= self.goal


def measure_start_up(words: Sequence[str], settings: Settings, folder: Path) -> StartUp:
    """Starts ``routerlab train words`` some times after once for the caches, with W&B offline."""
    cpu, file = settings.clock is time.process_time, folder / "first_step.json"
    watch = [f"+callback.first_step._target_={_CALLBACK}", f"+callback.first_step.file={file}"]
    threads = torch.get_num_threads()
    found: list[list[float]] = []
    imports: list[float] = []
    for number in range(_ROUNDS + 1):
        launched = time.time()
        routerlab("train", *words, *watch, f"run_dir={folder / f'start_{number}'}", threads=threads)
        marks = [json.loads(file.read_text())[name] for name in _MARKS]
        ends = [process if cpu else wall - launched for wall, process in marks]
        imports.append(_import(cpu))
        found.append(ends)
    built, set_up, stepped = zip(*found[1:], strict=True)
    middle = statistics.median
    return StartUp(
        seconds=middle(stepped),
        least=min(stepped),
        most=max(stepped),
        imports=middle(imports[1:]),
        before_run=middle(built),
        run_and_loggers=middle(b - a for a, b in zip(built, set_up, strict=True)),
        first_step=middle(b - a for a, b in zip(set_up, stepped, strict=True)),
        processes=_ROUNDS,
    )


def _import(cpu: bool) -> float:
    code = f"{_IMPORTS}, time; print(time.time(), time.process_time())"
    launched = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    wall, process = map(float, done.stdout.split())
    return process if cpu else wall - launched
