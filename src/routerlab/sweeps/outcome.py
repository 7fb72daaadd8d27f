"""What became of a job."""

import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from routerlab.sweeps.jobs import Job
from routerlab.training.run_directory import RunDirectory

_FULL = 2**20  # bytes: a run that ends with less room than this could not write why
# Key of a run's result: what it is called, whether the highest is best
_HEADLINES = {"accuracy": ("accuracy", True), "bits_per_byte": ("bits per byte", False)}


@dataclass(frozen=True)
class Outcome:
    """A job that has ended: done, or else failed with an ``error`` of one line.

    ``seconds`` is what a done run took, start-up apart, and how long a failed one was tried.
    """

    job: Job
    done: bool
    score: int | float | None = None
    unit: str = ""
    highest_is_best: bool = False
    seconds: int | float | None = None
    error: str = ""

    @property
    def text(self) -> str:
        """The score, or why there is none."""
        if not self.done:
            return f"FAILED, {self.error}"
        return "done" if self.score is None else f"{self.score:.3f} {self.unit}"


def finished(job: Job) -> Outcome:
    """The outcome of a job that is done."""
    found = (RunDirectory(job.path).read_json("summary.json") or {}).get("val", {})
    seconds = run_seconds(job.path)
    for key, (unit, highest) in _HEADLINES.items():
        if key in found:
            return Outcome(job, True, found[key], unit, highest, seconds)
    return Outcome(job, True, seconds=seconds)


def failed(job: Job, seconds: int | float | None, said: bool = True) -> Outcome:
    """The outcome of a job that is not done; ``said``: its status is of this attempt."""
    error = job.error(said)
    if (room := _room(job.path)) < _FULL and "No space" not in error:
        error += f" (only {room / 2**20:.2f} MiB are left on its disk)"
    return Outcome(job, False, seconds=seconds, error=error)


def run_seconds(path: Path) -> int | float | None:
    """How long a finished run took, from its config to its end; of one that went on after a break,
    at least the time spent in training steps.
    """
    read = RunDirectory(path).read_json
    status, summary = read("status.json") or {}, read("summary.json") or {}
    start = path / "environment.json"  # written at each start
    if status.get("state") != "done" or "train_seconds" not in summary or not start.is_file():
        return None
    whole = datetime.fromisoformat(status["at"]).timestamp() - start.stat().st_mtime
    return max(whole, summary["train_seconds"])


def stamp(job: Job) -> int | None:
    """Changes whenever the run says how it stands."""
    path = job.path / "status.json"
    return path.stat().st_mtime_ns if path.is_file() else None


def _room(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
