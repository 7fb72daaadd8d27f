"""A job of a sweep: one run, the words that make it, and what its directory says of it."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from routerlab.core.config import quoted, user_dirs
from routerlab.training.run_directory import RunDirectory

# cut: killed or preempted, and can go on
State = Literal["new", "running", "cut", "failed", "done"]
# What follows "error: ", or a line such as "RuntimeError: ..."
_ERROR = re.compile(r"(?:\berror: |^(?:\w+\.)*(?=\w*(?:Error|Exception)(?::|$)))(?P<text>.*)")


@dataclass(frozen=True)
class Job:
    """One run of a sweep: ``title`` tells it from the others (``router=hash seed=1``), ``path`` is
    its directory, ``words`` make it (without ``run_dir``); runs in ``after`` must be done first.
    """

    title: str
    path: Path
    words: tuple[str, ...]
    after: tuple[Path, ...] = ()

    @property
    def log(self) -> Path:
        """What its process prints; every attempt appends."""
        return self.path / "job.log"

    def state(self) -> State:
        """What the directory says now, whoever trains it."""
        run = RunDirectory(self.path)
        if run.is_held():
            return "running"
        if not (self.path / "config.yaml").is_file():
            return "new"
        said = (run.read_json("status.json") or {}).get("state")
        return said if said in ("done", "failed") else "cut"

    def command(self) -> list[str]:
        """The process that starts the run, or goes on with it."""
        folders = [word for path in user_dirs() for word in ("--config-dir", str(path))]
        begun = (self.path / "config.yaml").is_file()
        words = (
            [f"resume={quoted(str(self.path))}"]
            if begun
            else [*self.words, f"run_dir={quoted(str(self.path))}"]
        )
        return [sys.executable, "-m", "routerlab.cli.main", "train", *folders, *words]

    def error(self, said: bool = True) -> str:
        """Why it failed, in a line: from its status (where ``said``), or else the last error that
        it printed.
        """
        status = RunDirectory(self.path).read_json("status.json") or {}
        if said and status.get("state") == "failed":
            return str(status["error"]).splitlines()[0]
        printed = self.log.read_text(errors="replace").strip() if self.log.is_file() else ""
        lines = printed.splitlines() or ["it printed nothing"]
        errors = (found for line in reversed(lines) if (found := _ERROR.search(line)))
        last = next(errors, None)
        return lines[-1].strip() if last is None else last["text"].strip()


@runtime_checkable
class Launcher(Protocol):
    """Where jobs are trained. It hands them over and tells which have ended, no matter how."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes jobs on; returns at once. Raises `ConfigError` where none can be started."""
        ...

    def poll(self) -> list[Job]:
        """The jobs that have ended since the last call."""
        ...

    def running(self) -> list[Job]:
        """The jobs that are being trained now; the others wait."""
        ...

    def stop(self) -> str:
        """On Ctrl-C or SIGTERM: stops what it must, waits until that has saved, and says in a
        sentence what becomes of the jobs.
        """
        ...
