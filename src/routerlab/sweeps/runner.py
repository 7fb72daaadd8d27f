"""Trains the jobs of a sweep until each is done or has failed."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from routerlab.core.config import ConfigError
from routerlab.sweeps.display import Display, Tally, closing
from routerlab.sweeps.jobs import Job, Launcher
from routerlab.sweeps.outcome import Outcome, failed, finished, stamp
from routerlab.sweeps.search import Source
from routerlab.training.run_directory import RunDirectory

_ROUND = 0.1  # seconds between two looks at the jobs
_WATCH = 1.0  # seconds between two looks at those that another process trains


def run(source: Source, launcher: Launcher, folder: Path, then: str) -> int:
    """Trains what ``source`` asks for; returns 0 (all done), 1 (some failed), or 128 + the number
    of the signal that stopped it. ``then``: the command that looks at what came of it.

    Raises `ConfigError` if another sweep holds ``folder``, or if it cannot be written.
    """
    display = Display()
    with held(folder):
        runner = Runner(source, launcher, display)
        with _noted_signals(runner):
            try:
                runner.loop()
            except BaseException:
                display.say(launcher.stop())
                raise
            finally:
                display.close()
            if runner.signal is not None:
                display.say("stopping ... (a second Ctrl-C does not wait)", "yellow")
                signal.signal(signal.SIGINT, signal.default_int_handler)
                display.say(f"{launcher.stop()}{runner.left_alone()}")
                runner.settle()
    outcomes = list(runner.outcomes.values())
    closing(outcomes, folder, then, display.console)
    if runner.signal is not None:
        left = runner.tally.total - runner.tally.done
        display.say(f"interrupted; the same command goes on with the {left} that are not done")
        return 128 + runner.signal
    return int(any(not outcome.done for outcome in outcomes))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other sweeps from a folder, which is made if need be."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"sweep folder {str(folder)!r}: another process runs a sweep there; wait until it has "
            "ended, or choose another folder with group=NAME"
        ) from error
    except OSError as error:
        raise ConfigError(f"sweep folder {str(folder)!r} cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()


class Runner:
    """Moves jobs from the source to the launcher, and what became of them back.

    A job that is done is only counted. One that another process trains is watched until that ends,
    and goes to the launcher if it was cut off. No failure stops the others.
    """

    def __init__(self, source: Source, launcher: Launcher, display: Display) -> None:
        self.source, self.launcher, self.display = source, launcher, display
        self.tally = Tally(source.total)
        self.outcomes: dict[Path, Outcome] = {}
        self.signal: int | None = None
        self._waiting: list[Job] = []  # some for runs that they build on
        self._elsewhere: list[Job] = []
        self._watched = 0.0
        self._handed: dict[Path, tuple[Job, int | None]] = {}  # with the stamp of its status
        self._tried: set[Path] = set()
        self._opened = self._told = False

    def loop(self) -> None:
        """Goes on until nothing is left, or until a signal is noted."""
        self._ask()
        self.tally.before = self.tally.done
        self.display.open(self.tally)
        self._opened = True
        while self.signal is None:
            self._hand_over()
            for job in self.launcher.poll():
                self._ended(job)
            self._watch()
            if self._told:
                self._ask()
            self._count()
            if not (self._waiting or self._elsewhere or self._handed) and self.source.done():
                return
            self.display.show(self.tally)
            time.sleep(_ROUND)

    def settle(self) -> None:
        """Counts what was done by the time that the launcher had stopped."""
        for job, _ in list(self._handed.values()):
            if job.state() == "done":
                self._close(finished(job))

    def left_alone(self) -> str:
        """What is to be said of jobs of other processes."""
        count = len(self._elsewhere)
        return f"; {count} that another process trains were left alone" if count else ""

    def _ask(self) -> None:
        self._told = False
        jobs, self.tally.total = self.source.ask(), self.source.total
        for job in jobs:
            if (state := job.state()) == "done":
                self._close(finished(job))
            elif state == "running":
                self._elsewhere.append(job)
            else:
                self._waiting.append(job)

    def _hand_over(self) -> None:
        ready = []
        for job in self._waiting:
            verdicts = [self._obstacle(path) for path in job.after]
            if wrong := next(filter(None, verdicts), None):
                self._close(Outcome(job, False, error=wrong))
            elif None not in verdicts:
                ready.append(job)
        gone = {job.path for job in ready} | self.outcomes.keys()
        self._waiting = [job for job in self._waiting if job.path not in gone]
        for job in ready:
            self._handed[job.path] = (job, stamp(job))
            self._tried.add(job.path)
        if ready:
            self.launcher.submit(ready)

    def _obstacle(self, path: Path) -> str | None:
        """Why a job that builds on the run at ``path`` can never start; empty if it can start now,
        None if it must wait.
        """
        run = RunDirectory(path)
        state = (run.read_json("status.json") or {}).get("state", "was never trained")
        if state == "done":
            return ""
        mine = [*self._waiting, *self._elsewhere, *(job for job, _ in self._handed.values())]
        if any(job.path == path for job in mine) or run.is_held():
            return None
        return f"the run that it builds on {state}: {path}"

    def _ended(self, job: Job) -> None:
        _, before = self._handed.pop(job.path)
        since = self.tally.running.get(job.path, (job, None))[1]
        seconds = None if since is None else time.monotonic() - since
        if (state := job.state()) == "done":
            self.tally.seconds += [] if seconds is None else [seconds]
            self._close(finished(job))
        elif state == "running":  # another process was faster
            self._elsewhere.append(job)
        else:
            self._close(failed(job, seconds, said=stamp(job) != before))

    def _watch(self) -> None:
        """Looks after the jobs that other processes train."""
        now = time.monotonic()
        if now - self._watched < _WATCH:
            return
        self._watched = now
        for job in list(self._elsewhere):
            if (state := job.state()) == "running":
                continue
            self._elsewhere.remove(job)
            if state == "done":
                self._close(finished(job))
            elif state == "cut" and job.path not in self._tried:
                self._waiting.append(job)
            else:
                self._close(failed(job, None))

    def _close(self, outcome: Outcome) -> None:
        self.outcomes[outcome.job.path] = outcome
        self.tally.running.pop(outcome.job.path, None)
        self.tally.done += outcome.done
        self.tally.failed += not outcome.done
        self.source.tell(outcome.job)
        self._told = True
        if self._opened:
            self.display.ended(outcome, self.tally)

    def _count(self) -> None:
        now, before = time.monotonic(), self.tally.running
        running = [*self.launcher.running(), *self._elsewhere]
        self.tally.running = {job.path: before.get(job.path, (job, now)) for job in running}
        if new := [job for job in running if job.path not in before]:
            self.display.started(new, self.tally)


@contextlib.contextmanager
def _noted_signals(runner: Runner) -> Iterator[None]:
    """Ctrl-C and SIGTERM are written down; the loop ends at its next round."""

    def note(number: int, frame: FrameType | None) -> None:
        runner.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
