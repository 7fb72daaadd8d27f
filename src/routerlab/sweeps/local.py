"""Jobs as processes of this machine, which share its cores, memory and GPUs."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from routerlab.core.config import ConfigError
from routerlab.sweeps.jobs import Job
from routerlab.training.environment import memory_bytes

_BYTES_OF_A_RUN = 2 * 2**30  # of memory, expected
_PATIENCE = 60.0  # seconds in which a stopped run must have saved


class Local:
    """``workers`` processes at a time, which outlive this one if it is killed.

    Each holds the lock of a worker's place in ``folder``, so that another process that goes on with
    these jobs leaves occupied cores and GPUs alone. ``gpus`` (as in ``CUDA_VISIBLE_DEVICES``) are
    dealt out, ``devices`` to each; without any, a job gets its share of the cores.
    """

    def __init__(
        self, folder: Path, workers: int, gpus: Sequence[str] = (), devices: int = 1
    ) -> None:
        if workers < 1:
            raise ConfigError(f"launcher.workers={workers}: must be at least 1")
        self.folder, self.workers, self.gpus, self.devices = folder, workers, gpus, devices
        processes = workers if gpus else workers * devices
        self.threads = max(1, usable_cores() // processes)
        self._waiting: deque[Job] = deque()
        self._children: dict[int, tuple[Job, subprocess.Popen, float]] = {}  # by place
        self._ended: list[Job] = []  # without a process of ours

    def submit(self, jobs: Sequence[Job]) -> None:
        """Starts as many as there is room for; the others wait."""
        self._waiting.extend(jobs)
        self._fill()

    def poll(self) -> list[Job]:
        """The jobs whose process has ended; others take their places."""
        ended, self._ended = self._ended, []
        for place, (job, child, start) in list(self._children.items()):
            if child.poll() is not None:
                del self._children[place]
                _write(job.log, _ending(child.returncode, time.monotonic() - start))
                ended.append(job)
        self._fill()
        return ended

    def running(self) -> list[Job]:
        """The jobs that have a process."""
        return [job for job, *_ in self._children.values()]

    def stop(self) -> str:
        """Asks every process to save and end; kills those that take longer than a minute, or all at
        a second Ctrl-C.
        """
        self._waiting.clear()
        children = [child for _, child, _ in self._children.values()]
        deadline = time.monotonic() + _PATIENCE
        with contextlib.suppress(KeyboardInterrupt):
            for child in children:
                child.terminate()
            while time.monotonic() < deadline and any(c.poll() is None for c in children):
                time.sleep(0.1)
        late = [child for child in children if child.poll() is None]
        for child in late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with the processes that it started
            child.wait()
        self.poll()
        text = f"stopped; {len(children) - len(late)} of {len(children)} running jobs have saved"
        return f"{text}, the others were killed" if late else text

    def environment(self, place: int) -> dict[str, str]:
        """What a job at a worker's place sees: its share of cores and GPUs."""
        shared = {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        if self.workers > 1:
            shared["OMP_WAIT_POLICY"] = "PASSIVE"  # idle threads leave the others their cores
        if self.gpus:
            first = place * self.devices
            mine = [self.gpus[(first + i) % len(self.gpus)] for i in range(self.devices)]
            shared["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
        # Inside a job of SLURM, a run of ours is not that job, which is not its to queue again.
        own = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        return own | shared

    def _fill(self) -> None:
        for place in range(self.workers):
            if place in self._children or not self._waiting:
                continue
            job = self._waiting[0]
            try:
                if not self._start(job, place):
                    continue
            except OSError as error:
                _write(job.log, f"--- error: cannot be started: {error}")
                self._ended.append(job)
            self._waiting.popleft()

    def _lock(self, place: int) -> int | None:
        """The open lock of a place, or None while a process holds it, whoever started that."""
        lock = os.open(self.folder / f".worker_{place}", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def _start(self, job: Job, place: int) -> bool:
        """Whether the place was free."""
        if (lock := self._lock(place)) is None:
            return False
        try:
            if job.state() in ("done", "running"):  # by an older process, in the meantime
                self._ended.append(job)
                return True
            environment, command = self.environment(place), job.command()
            about = f"{self.threads} threads"
            if self.gpus:
                about += f", GPU {environment['CUDA_VISIBLE_DEVICES']}"
            job.path.mkdir(parents=True, exist_ok=True)
            with job.log.open("a") as log:
                now = datetime.now().astimezone().isoformat(" ", "seconds")
                print(f"--- {now} ({about}) {' '.join(command[3:])}", file=log, flush=True)
                child = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for us, and we ask it to save
                    pass_fds=(lock,),  # the place is free when the process has gone
                )
        finally:
            os.close(lock)
        self._children[place] = (job, child, time.monotonic())
        return True


def from_config(cfg: DictConfig, folder: Path, jobs: int) -> Local:
    """The launcher for ``jobs`` jobs of a sweep with this config.

    Workers, unless ``launcher.workers`` says otherwise: one for ``trainer.devices`` GPUs or cores,
    in so far as memory allows. All of it depends on the machine and the whole sweep alone, so that
    a job that goes on has as many threads as before.
    """
    trainer, workers = cfg.trainer, cfg.launcher.workers
    devices = _devices(trainer.get("devices", 1))
    gpus = [] if trainer.get("accelerator") == "cpu" else visible_gpus()
    if workers is None:
        found, memory = len(gpus) or usable_cores(), usable_memory()
        if not gpus and memory:
            found = min(found, memory // _BYTES_OF_A_RUN)
        workers = max(1, found // devices)
    elif isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"launcher.workers={workers}: must be a whole number, at least 1")
    return Local(folder, min(workers, max(1, jobs)), gpus, devices)


def visible_gpus() -> list[str]:
    """The GPUs of NVIDIA that ``CUDA_VISIBLE_DEVICES`` leaves, under the names that it takes."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = told.split()
    if (said := os.environ.get("CUDA_VISIBLE_DEVICES")) is None or not found:
        return found
    named = [word.strip() for word in said.split(",")]
    return [word for word in named if word and word != "-1"]


def usable_cores() -> int:
    """The cores that this process may use, by its affinity and its control group."""
    everywhere = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everywhere
    quota, *period = _control_group("cpu.max") or ["max"]
    if quota != "max" and period:
        cores = min(cores, max(1, int(quota) // int(period[0])))
    return cores


def usable_memory() -> int:
    """Bytes of memory of this machine or control group; 0 where it cannot be told."""
    limit = (_control_group("memory.max") or ["max"])[0]
    return memory_bytes() if limit == "max" else min(memory_bytes(), int(limit))


def _control_group(name: str) -> list[str]:
    path = Path("/sys/fs/cgroup") / name
    return path.read_text().split() if path.is_file() else []


def _devices(said: Any) -> int:
    """How many devices a value of ``trainer.devices`` asks for; one where that is left open."""
    if isinstance(said, Sequence) and not isinstance(said, str):
        return max(1, len(said))
    if isinstance(said, str) and "," in said:
        return len(said.split(","))
    return max(1, int(said)) if str(said).isdigit() else 1


def _ending(code: int, seconds: float) -> str:
    after = f"--- after {seconds:.0f} s"
    if code < 0:
        return f"{after}: error: killed (signal {-code}); the same command goes on"
    if code > 128:  # it saved first
        return f"{after}: error: stopped (signal {code - 128}); the same command goes on"
    return f"{after}: exit code {code}"


def _write(log: Path, line: str) -> None:
    with contextlib.suppress(OSError), log.open("a") as file:  # a full disk, which is told anyway
        print(line, file=file)
