"""Signals that ask a run to stop and to go on later, and the queue that it goes back to.

SLURM sends one some minutes before the time limit or before it gives the node away. This module is
light, so that a signal can be noted while the rest of a run is still being imported.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
_PATIENCE = 60  # seconds that the other processes of a job wait for the first one to end it


class Preempted(SystemExit):
    """A run was stopped by a signal and can go on. Exit code: 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}"


class Notice:
    """A signal handler that notes the signal and does nothing else: a run acts on it between two
    steps.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Notes it."""
        self.number = number


@contextlib.contextmanager
def noticed() -> Iterator[Notice]:
    """Notes `SIGNALS` from now on, those that waited while they were blocked included.

    A run that this stops (`Preempted`) goes back into SLURM's queue if it came from there. Inside
    another `noticed`, as for a baseline of a run, everything is left to the outer one.
    """
    outer = signal.getsignal(SIGNALS[0])
    if isinstance(outer, Notice):
        yield outer
        return
    notice = Notice()
    if threading.current_thread() is not threading.main_thread():  # it can have no handler
        yield notice
        return
    before = {number: signal.signal(number, notice) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield notice
    except Preempted as stop:
        _leave(stop)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _leave(stop: Preempted) -> None:
    from routerlab.training.processes import is_main_process  # imports lightning

    job = slurm_job()
    if not is_main_process():
        if job is not None:
            time.sleep(_PATIENCE)
        stop.code = 0  # the first process speaks for the run
        return
    print("\n  ".join([str(stop), *getattr(stop, "__notes__", [])]), flush=True)
    if job is not None and stop.signal in SIGNALS:  # on SIGTERM, SLURM has decided
        print(_requeued(job), flush=True)


def slurm_job() -> str | None:
    """The id of the SLURM job, or of the task of a job array, that this process is in."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def _requeued(job: str) -> str:
    """Puts a job back into the queue, which ends this attempt; says what came of it."""
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"SLURM did not queue job {job} again: {error}"
    if done.returncode:
        words = (done.stderr or done.stdout).strip()
        return f"SLURM did not queue job {job} again: {words}"
    return f"SLURM queued job {job} again"
