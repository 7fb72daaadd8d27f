"""Whole training: `routerlab train` against bare loops, its losses and diagnostics, its start."""

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routerlab.bench.layer import Settings
from routerlab.bench.start_up import StartUp, measure_start_up
from routerlab.bench.step import StepShare, bench_step
from routerlab.bench.step_size import StepSize
from routerlab.bench.timing import Ratio, Sample, summary
from routerlab.bench.training_loops import BARE, OURS, TRANSFORMERS
from routerlab.core.config import compose
from routerlab.training.train import train

GOALS = {OURS: 1.1, "to transformers": 1.0}  # times its steps
WIDE = 1024  # d_model from which losses and diagnostics have the lower of their goals
_CALLBACK = "routerlab.bench.training_loops.Rivals"
_NEVER = 10**9  # steps
# Validations and checkpoints are left out of the steps; a few windows end the run.
_WORDS = (
    "experiment=quickstart", "trainer.devices=1", "trainer.strategy=auto", "trace_sequences=0",
    "trace_validations=false", f"trainer.val_check_interval={_NEVER}",
    f"callback.checkpoint.every_n_steps={_NEVER}", "data.max_val_windows=8",
    "data.final_val_windows=8",
)  # fmt: skip

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LoopRow:
    """A contestant's time over that of the bare loop, and its speed."""

    name: str
    ratio: float
    lower: float | None
    upper: float | None
    tokens_per_second: float
    milliseconds: float
    samples: int
    busy: int
    goal: float | None

    @property
    def met(self) -> bool | None:
        """Whether the ratio is within the goal."""
        return None if self.goal is None else self.ratio <= self.goal


@dataclass(frozen=True, slots=True)
class TrainingFound:
    """Everything that was measured of training at one size."""

    size: StepSize
    rows: list[LoopRow]
    to_transformers: float  # our time over that of transformers
    share: StepShare
    start_up: StartUp | None

    @property
    def share_goal(self) -> float:
        """Percent of a step that losses and diagnostics may take."""
        return 3.0 if self.size.d_model >= WIDE else 5.0

    @property
    def met(self) -> dict[str, bool]:
        """Each goal, and whether it is met."""
        ours = next(row for row in self.rows if row.name == OURS)
        found = {
            "bare loop": bool(ours.met),
            "transformers": self.to_transformers < GOALS["to transformers"],
            "losses and diagnostics": self.share.promised_percent <= self.share_goal,
        }
        return found | ({} if self.start_up is None else {"start-up": self.start_up.met})


def bench_training(
    size: StepSize,
    settings: Settings,
    start_up: bool = True,
    words: Sequence[str] = (),
    progress: Progress = lambda text: None,
) -> TrainingFound:
    """Trains ``experiment=quickstart`` at this size while bare loops take turns; ``words`` are more
    of the command line.
    """
    words = [*_WORDS, *size.words(), f"seed={settings.seed}", *words]
    words.append(f"trainer.accelerator={'gpu' if settings.device.type == 'cuda' else 'cpu'}")
    with tempfile.TemporaryDirectory(prefix="routerlab-bench-") as name:
        place = Path(name).resolve()
        progress(f"{size}: training, in turns with bare loops")
        samples, chunk = _turns(words, settings, place)
        ratios = {name: summary(triples) for name, triples in samples.items()}
        rows = _rows(ratios, samples[OURS], chunk, size)
        progress("a training step with and without losses and diagnostics")
        share = bench_step(settings, size)
        started = None
        if start_up:
            progress("fresh processes up to their first step")
            started = measure_start_up([*words, "trainer.max_steps=1"], settings, place)
    to_transformers = ratios[OURS].median / ratios[TRANSFORMERS].median
    return TrainingFound(size, rows, to_transformers, share, started)


def _turns(
    words: Sequence[str], settings: Settings, place: Path
) -> tuple[dict[str, list[tuple[Sample, Sample, Sample]]], int]:
    """The samples of each contestant between two of the bare loop, and the steps of a sample."""
    file, cpu = place / "turns.json", settings.clock is time.process_time
    cfg = compose(
        *words,
        f"trainer.max_steps={_NEVER}",
        f"run_dir={place / 'run'}",
        f"+callback.rivals={{_target_: {_CALLBACK}, file: {file}, seconds: {settings.seconds}, "
        f"cpu_clock: {str(cpu).lower()}}}",
    )
    with _offline(), contextlib.redirect_stdout(io.StringIO()):
        train(cfg, words)
    found: Mapping[str, Any] = json.loads(file.read_text())
    samples = {
        name: [tuple(Sample(**sample) for sample in triple) for triple in triples]
        for name, triples in found.items()
    }
    return samples, cfg.objective.log_every  # type: ignore[return-value]


def _rows(
    ratios: Mapping[str, Ratio],
    triples: Sequence[tuple[Sample, Sample, Sample]],
    chunk: int,
    size: StepSize,
) -> list[LoopRow]:
    """The bare loop, whose own time is that around the samples of ours, and the others."""
    bare = summary([(before, before, before) for before, _, _ in triples])
    rows = []
    for name, found in ({BARE: bare} | dict(ratios)).items():
        milliseconds = found.milliseconds / chunk
        rows.append(
            LoopRow(
                name,
                found.median,
                None if name == BARE else found.lower,
                None if name == BARE else found.upper,
                1000 * size.tokens / milliseconds,
                milliseconds,
                found.samples,
                found.busy,
                GOALS.get(name),
            )
        )
    return rows


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """W&B writes files only."""
    before = os.environ.get("WANDB_MODE")
    os.environ["WANDB_MODE"] = "offline"
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_MODE"]
        else:
            os.environ["WANDB_MODE"] = before
