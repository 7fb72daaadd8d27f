"""What the machinery around training costs: checkpoints, comparisons, sweeps."""

import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from routerlab.bench.generated_runs import generate
from routerlab.bench.layer import Settings
from routerlab.bench.report import environment, number
from routerlab.bench.saving import Saving, measure_saving
from routerlab.bench.timing import Clock
from routerlab.core.config import compose

GOALS = {"checkpoints": 3.0, "compare": 10.0, "sweep": 1.0}  # percent, seconds, seconds a job
_COLUMNS = ("", "median", "range", "", "goal", "met")
_ROUNDS = 3
# Of the jobs of a sweep: four layers, so that they log as many columns as usual runs.
_TINY = (
    "data=files", "data.seq_len=32", "data.batch_size=8", "data.val_batch_size=8",
    "data.max_val_windows=16", "backbone.d_model=32", "backbone.num_heads=2",
    "backbone.num_kv_heads=1", "backbone.d_ff=32", "trainer.max_steps=4",
    "trainer.val_check_interval=2", "objective.log_every=2", "logger=[]",
)  # fmt: skip
_ROUTERS = ("token_choice", "hash", "switch", "top_p", "sinkhorn")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Numbers:
    """How many jobs of a sweep, compared runs, and steps that each of these has logged."""

    jobs: int = 3
    runs: int = 200
    steps: int = 2000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"--{name}={value}: must be at least 1")


@dataclass(frozen=True, slots=True)
class RunningRow:
    """A median of some measurements, their range, and what they are of."""

    name: str
    value: float
    lowest: float
    highest: float
    unit: str
    measured: str
    goal: float | None

    @classmethod
    def of(
        cls, name: str, found: Sequence[float], unit: str, measured: str, goal: float | None
    ) -> "RunningRow":
        """The row of some measurements."""
        middle = statistics.median(found)
        return cls(name, middle, min(found), max(found), unit, measured, goal)

    @property
    def met(self) -> bool | None:
        """Whether the median is within the goal."""
        return None if self.goal is None else self.value <= self.goal


def bench_running(
    numbers: Numbers, settings: Settings, folder: Path, progress: Progress = lambda text: None
) -> list[RunningRow]:
    """Checkpoints' share of training time, seconds that a sweep adds to each job, and seconds of a
    comparison. All files are written below ``folder`` (its disk counts) and deleted. Where the
    clock is the CPU's, what sweeps and comparisons wait for is not counted.
    """
    clock = settings.clock if settings.clock is time.perf_counter else _cpu_of_children
    with tempfile.TemporaryDirectory(prefix="routerlab-bench-", dir=folder) as name:
        place = Path(name).resolve()
        progress("steps and checkpoints of the quickstart model")
        rows = [_checkpoints(measure_saving(settings, place / "saving"))]
        jobs = Jobs(place, numbers.jobs)
        progress("one run, so that its data are ready")
        template = jobs.alone("ready", 0)
        rows.append(_sweep(jobs, clock, progress))
        progress(f"{numbers.runs} runs to compare")
        runs = place / "runs"
        generate(template, runs, numbers.runs, numbers.steps, _ROUTERS, settings.seed)
        rows += _compare(runs, numbers, clock, progress)
    return rows


def _checkpoints(found: Saving) -> RunningRow:
    interval = compose().callback.checkpoint.every_n_steps
    return RunningRow.of(
        "checkpoints",
        [100 * save / (save + interval * found.step) for save in found.saves],
        "% of training",
        f"{len(found.saves)} saves of {found.mebibytes:.1f} MiB, one in {interval} steps "
        f"of {1000 * found.step:.0f} ms",
        GOALS["checkpoints"],
    )


class Jobs:
    """Tiny runs, in a sweep or one by one."""

    def __init__(self, place: Path, jobs: int) -> None:
        self.place, self.jobs = place, jobs
        text = place / "text.txt"
        text.write_text("\n\n".join(pydoc_data.topics.topics.values())[:60_000])
        self.words = [
            *_TINY, f"data.domains={{prose: {text}}}", f"paths.cache_dir={place / 'cache'}",
            f"paths.output_dir={place / 'outputs'}",
        ]  # fmt: skip

    def alone(self, name: str, seed: int) -> Path:
        """One run, as a user starts it; its directory."""
        path = self.place / "alone" / name
        routerlab("train", *self.words, f"seed={seed}", f"run_dir={path}")
        return path

    def sweep(self, name: str) -> None:
        """All jobs, one after the other."""
        seeds = ",".join(map(str, range(self.jobs)))
        routerlab(
            "train", "-m", *self.words, f"seed={seeds}", f"group={name}", "launcher.workers=1"
        )


def _sweep(jobs: Jobs, clock: Clock, progress: Progress) -> RunningRow:
    """Sweeps, each between two rounds of its jobs one by one."""
    times = [clock()]
    for turn in range(_ROUNDS + 1):
        progress(f"{jobs.jobs} jobs one by one and as a sweep, in turns: {turn} of {_ROUNDS}")
        if turn:
            jobs.sweep(f"turn_{turn}")
            times.append(clock())
        for seed in range(jobs.jobs):
            jobs.alone(f"{turn}_{seed}", seed)
        times.append(clock())
    spent = [end - start for start, end in pairwise(times)]
    triples = zip(spent[0::2], spent[1::2], spent[2::2], strict=False)
    overheads = [(swept - (before + after) / 2) / jobs.jobs for before, swept, after in triples]
    alone = statistics.median(spent[0::2]) / jobs.jobs
    measured = f"{_ROUNDS} sweeps of {jobs.jobs} jobs, which take {alone:.1f} s alone"
    return RunningRow.of("sweep", overheads, "s a job", measured, GOALS["sweep"])


def _compare(runs: Path, numbers: Numbers, clock: Clock, progress: Progress) -> list[RunningRow]:
    size = sum(path.stat().st_size for path in runs.rglob("metrics.csv")) / 2**20
    measured = f"{numbers.runs} runs of {numbers.steps} steps, {size:,.0f} MiB"
    rows = []
    for name, more in (("compare", []), ("compare, with page", ["--out", f"{runs}.html"])):
        progress(f"{name}: {measured}")
        words = ["compare", str(runs), "--by", "router", *more]
        found = []
        for _ in range(_ROUNDS):
            start = clock()
            routerlab(*words)
            found.append(clock() - start)
        rows.append(RunningRow.of(name, found, "s", measured, GOALS["compare"]))
    return rows


def routerlab(*words: str, threads: int | None = None) -> None:
    """Runs a command as a process of its own; raises `RuntimeError` with what it said if it fails.

    Without ``threads`` it has as many as this machine has cores, as in a sweep with one worker.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    variables = {"OMP_NUM_THREADS": str(threads or cores), "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "routerlab.cli.main", *words]
    done = subprocess.run(
        command,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        start_new_session=True,  # as jobs of a sweep, which share a busy machine session by session
    )
    if done.returncode:
        raise RuntimeError(f"routerlab {words[0]} failed:\n{done.stdout}{done.stderr}")


def _cpu_of_children() -> float:
    """CPU seconds of all processes that were started from here and have ended, and of theirs."""
    found = os.times()
    return found.children_user + found.children_system


def running_table(rows: Sequence[RunningRow]) -> Table:
    """A row each, and below what was measured."""
    notes = [f"{row.name}: {row.measured}" for row in rows]
    title = "the machinery around training"
    table = Table(title=title, caption="\n".join(notes), box=box.SIMPLE_HEAD)
    for index, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            number(row.value),
            f"{number(row.lowest)} to {number(row.highest)}",
            row.unit,
            "" if row.goal is None else f"{row.goal:g}",
            {True: "yes", False: "no", None: ""}[row.met],
        )
    return table


def running_json(
    numbers: Numbers, rows: Sequence[RunningRow], settings: Settings
) -> dict[str, Any]:
    """Everything that was measured, and where."""
    found = {"environment": environment(settings), "numbers": asdict(numbers)}
    return found | {"rows": [asdict(row) | {"met": row.met} for row in rows]}
