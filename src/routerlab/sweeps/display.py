"""What a sweep shows while it runs: a live table in a terminal, plain lines elsewhere."""

import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from routerlab.sweeps.jobs import Job
from routerlab.sweeps.outcome import Outcome

_STEP = re.compile(r"^step (\d+)/(\d+)\s+(.*)$", re.MULTILINE)  # what a run prints as it trains
_TAIL = 4096  # bytes of a log in which the newest of these lines is looked for
_REFRESH = 0.5  # seconds
_SUMMARY = 60.0  # seconds between two lines on all jobs, without a terminal
_MOST_STARTED = 8  # jobs that are named when they start at once
_MOST_ROWS = 40  # of a table


@dataclass
class Tally:
    """How a sweep stands. ``running``: each job and when it was first seen running (monotonic)."""

    total: int
    before: int = 0  # done when the sweep began
    done: int = 0
    failed: int = 0
    running: dict[Path, tuple[Job, float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # that jobs took here

    @property
    def waiting(self) -> int:
        """Jobs that have not been started, or not even been chosen."""
        return max(0, self.total - self.done - self.failed - len(self.running))

    def text(self) -> str:
        """In a line."""
        parts = [f"{self.done} done"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{len(self.running)} running", f"{self.waiting} waiting"]
        left = self.left() or 0.0
        return ", ".join(parts) + (f"; about {duration(left)} left" if left >= 1 else "")

    def left(self) -> float | None:
        """Seconds until all is done, if one can tell: from jobs that ended, or else from the steps
        of those that run.
        """
        now, elsewhere = time.monotonic(), []
        if not self.seconds:
            for job, since in self.running.values():
                step, last, _ = progress(job)
                elsewhere += [(now - since) * last / step] if step else []
        known = self.seconds or elsewhere
        if not known or not self.running:
            return None
        whole = statistics.fmean(known)
        rest = [max(0.0, whole - (now - since)) for _, since in self.running.values()]
        return (sum(rest) + whole * self.waiting) / len(self.running)


class Display:
    """Shows a `Tally` as it changes."""

    def __init__(self) -> None:
        self.console = Console()
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._is_live = self.console.file.isatty() and not self.console.is_dumb_terminal
        self._shown = time.monotonic()

    def open(self, tally: Tally) -> None:
        """Begins."""
        self.say(
            f"{tally.before} of {tally.total} runs are done already, "
            f"{tally.total - tally.before} to go"
        )
        if self._is_live:
            self._live.start()

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a line, above the table if there is one."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def started(self, jobs: Sequence[Job], tally: Tally) -> None:
        """Names jobs that have begun; the live table shows them anyway."""
        if self._is_live:
            return
        if len(jobs) > _MOST_STARTED:
            self.say(f"{len(jobs)} jobs started")
            return
        for job in jobs:
            self.say(f"{job.title}: started")

    def ended(self, outcome: Outcome, tally: Tally) -> None:
        """Tells of a job that has ended; in a terminal only if it failed."""
        count = f"[{tally.done + tally.failed}/{tally.total}]"
        took = "" if outcome.seconds is None else f" ({duration(outcome.seconds)})"
        text = f"{count} {outcome.job.title}: {outcome.text}{took}"
        if outcome.done and self._is_live:
            return
        self.say(text, None if outcome.done else "red")
        if not outcome.done and outcome.job.log.is_file():
            self.say(f"  log: {outcome.job.log}")

    def show(self, tally: Tally) -> None:
        """Refreshes what is shown, if it is time."""
        now = time.monotonic()
        if now - self._shown < (_REFRESH if self._is_live else _SUMMARY):
            return
        self._shown = now
        if self._is_live:
            self._live.update(self._table(tally), refresh=True)
        else:
            self.say(tally.text())

    def close(self) -> None:
        """Takes the live table away."""
        if self._live.is_started:
            self._live.stop()

    def _table(self, tally: Tally) -> Group:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("running", "time", "step", ""):
            table.add_column(name, justify="left" if name in ("running", "") else "right")
            table.columns[-1].no_wrap, table.columns[-1].overflow = True, "ellipsis"
        room = max(1, min(_MOST_ROWS, self.console.size.height - 6))
        for job, since in list(tally.running.values())[:room]:
            step, last, text = progress(job)
            steps = f"{step}/{last}" if last else ""
            shown = (escape(job.title), duration(time.monotonic() - since), steps, escape(text))
            table.add_row(*shown)
        hidden = len(tally.running) - room
        return Group(table, *([f"... and {hidden} more"] if hidden > 0 else []), tally.text())


def progress(job: Job) -> tuple[int, int, str]:
    """The step, the last step and the numbers that a job printed last; zeros before the first."""
    try:
        with job.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = _STEP.findall(file.read().decode(errors="replace"))
    except OSError:
        return 0, 0, "starting"
    if not lines:
        return 0, 0, "starting"
    step, last, text = lines[-1]
    return int(step), int(last), text


def closing(outcomes: Sequence[Outcome], folder: Path, then: str, console: Console) -> None:
    """Prints the closing table, the best first, where the runs lie and the commands that follow;
    ``then`` is the first of these.
    """
    done = [outcome for outcome in outcomes if outcome.done]
    failed = [outcome for outcome in outcomes if not outcome.done]
    done.sort(key=_rank)
    best = done[: max(10, _MOST_ROWS - len(failed))]
    units = {outcome.unit for outcome in done} - {""}
    table = Table("job", "state", title=f"{len(done)} done, {len(failed)} failed")
    table.title_justify = "left"
    table.add_column(" or ".join(sorted(units)) or "result", justify="right")
    table.add_column("time", justify="right", no_wrap=True)
    for outcome in [*best, *failed[:_MOST_ROWS]]:
        table.add_row(
            escape(outcome.job.title),
            "done" if outcome.done else "[red]failed",
            "" if outcome.score is None else f"{outcome.score:.3f}",
            "" if outcome.seconds is None else duration(outcome.seconds),
        )

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if outcomes:
        console.print(table)
    for outcome in failed[:_MOST_ROWS]:  # below, since a narrow table would tear it to pieces
        say(f"{outcome.job.title}: {outcome.error}")
    for name, shown, every in (("done", best, done), ("failed", failed[:_MOST_ROWS], failed)):
        if len(shown) < len(every):
            say(f"and {len(every) - len(shown)} more that are {name}")
    lines = [f"runs in {folder}", *([f"next: {then}"] if done else [])]
    if next(folder.glob("*/wandb/offline-run-*"), None):
        lines.append(f"to W&B: wandb sync {folder}/*/wandb/offline-run-*")
    for line in lines:
        say(line)


def duration(seconds: int | float) -> str:
    """Such as ``42 s``, ``3 min`` or ``1.5 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5940 else f"{seconds / 3600:.1f} h"


def _rank(outcome: Outcome) -> tuple[str, float]:
    score = outcome.score if outcome.score is not None else float("inf")
    return outcome.unit, -score if outcome.highest_is_best else score
