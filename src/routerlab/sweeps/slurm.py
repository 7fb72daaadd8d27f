"""Jobs as tasks of a job array of SLURM."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from routerlab.core.config import ConfigError, user_dirs
from routerlab.sweeps.jobs import Job
from routerlab.sweeps.resources import sbatch_options
from routerlab.sweeps.slurm_task import Task

_EVERY = 2.0  # seconds between two looks at the queue
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "STOPPED"}
# Why a job waits, where time alone will end it.
_PATIENT = {
    "None", "Resources", "Priority", "BeginTime", "Dependency", "JobArrayTaskLimit", "Cleaning",
    "Reservation", "Prolog",
}  # fmt: skip
_END = re.compile(r"srun: error: .*: tasks? \S+: (.+)")  # Killed, Out Of Memory, Exited with ...
_GONE = "left the queue"  # long ago: SLURM forgets jobs after some minutes
_LARGEST_ARRAY = 1001  # unless the cluster says otherwise


@dataclass(frozen=True)
class Queued:
    """What SLURM says of a job: its state and the reason for it."""

    state: str
    reason: str


class Slurm:
    """Jobs in SLURM's queue, which go on whether anybody watches them or not.

    The ids are kept in ``<folder>/slurm/jobs.json``, so that a second call finds those that wait or
    run and submits none of them twice. Their end is read from the queue and from their own
    directories: a cluster need not keep accounts. Raises `ConfigError` where there is no ``sbatch``
    or ``cfg.resources`` make no sense.
    """

    def __init__(self, folder: Path, cfg: DictConfig) -> None:
        if shutil.which("sbatch") is None:
            raise ConfigError("launcher=slurm: there is no sbatch here; is this a SLURM cluster?")
        self.folder, self.at_once = folder / "slurm", cfg.launcher.at_once
        _check_at_once(self.at_once)
        name = re.sub(r"[^\w.-]+", "-", folder.name)
        self.options = sbatch_options(cfg) | {"job_name": name, "stderr_to_stdout": True}
        self._jobs: dict[str, Job] = {}  # by id, those that have not ended
        self._queue: dict[str, Queued] = {}
        self._looked = float("-inf")
        self._mentioned: set[str] = set()  # reasons for waiting

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts jobs into the queue, unless they are there since an earlier call.

        Raises `ConfigError` with SLURM's own words if it refuses them.
        """
        known = self._known()
        try:
            self._queue = self._squeue()  # or else some would be submitted twice
        except (OSError, subprocess.SubprocessError) as error:
            words = _words(str(getattr(error, "stderr", None) or error))
            raise ConfigError(f"SLURM does not answer: {words}") from error
        new = []
        for job in jobs:
            place = known.get(job.path.name, "")
            if place in self._queue and self._queue[place].state not in _ENDED:
                self._jobs[place] = job
            else:
                new.append(job)
        arrays = _cut(new, _largest_array())
        for array in arrays:
            share = max(1, self.at_once // len(arrays)) if self.at_once else len(array)
            for job, place in zip(array, self._sbatch(array, share), strict=True):
                self._jobs[place], self._queue[place] = job, Queued("PENDING", "None")
                known[job.path.name] = place
            self._keep(known)

    def poll(self) -> list[Job]:
        """The jobs that have left the queue, for whatever reason; it is added to their log."""
        self._look()
        ended = []
        for place, job in list(self._jobs.items()):
            said = self._queue.get(place, Queued(_GONE, ""))
            if said.state == "COMPLETING" and job.state() == "done":
                pass  # what the cluster still does is none of ours
            elif said.state in _ENDED or said.state == _GONE:
                _note_end(job, place, said, self.folder)
            else:
                continue
            del self._jobs[place]
            ended.append(job)
        return ended

    def running(self) -> list[Job]:
        """The jobs that have a node."""
        found = self._queue
        return [
            job for place, job in self._jobs.items()
            if place in found and found[place].state in _RUNNING
        ]  # fmt: skip

    def stop(self) -> str:
        """Leaves the jobs to SLURM; says how to cancel them."""
        if not self._jobs:
            return "nothing is left in SLURM's queue"
        ids = sorted({place.split("_")[0] for place in self._jobs}, key=int)
        return (
            f"{len(self._jobs)} jobs stay in SLURM's queue and go on; the same command watches "
            f"them again, and this cancels them: scancel {' '.join(ids)}"
        )

    def script(self, jobs: Sequence[Job]) -> str:
        """What sbatch would be given for these jobs."""
        executor = self._executor(min(self.at_once or len(jobs), len(jobs)))
        if len(jobs) > 1:
            executor.parameters["map_count"] = len(jobs)
        # submitit offers no public way to see the script before it is submitted
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def _executor(self, at_once: int) -> Any:
        from submitit import SlurmExecutor

        executor = SlurmExecutor(self.folder)
        executor.update_parameters(**self.options, array_parallelism=at_once)
        return executor

    def _sbatch(self, jobs: Sequence[Job], at_once: int) -> list[str]:
        """Submits jobs as one array; returns their ids."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The error holds the same words as what sbatch prints.
            with contextlib.redirect_stderr(io.StringIO()), _as_outside():
                executor = self._executor(at_once)
                with executor.batch():
                    tasks = [Task(job, self.folder, user_dirs()) for job in jobs]
                    submitted = [executor.submit(task) for task in tasks]
        except OSError as error:
            raise ConfigError(f"{self.folder}: {error}") from error
        except (FailedJobError, FailedSubmissionError) as error:
            raise ConfigError(
                f"sbatch refused the jobs: {_words(str(error))} (asked for: {self._asked()})"
            ) from error
        return [str(job.job_id) for job in submitted]

    def _asked(self) -> str:
        keys = ("partition", "account", "nodes", "ntasks_per_node", "gpus_per_node", "mem", "time")
        said = {**self.options, **self.options["additional_parameters"]}
        own = [key for key in said if key not in self.options and key not in ("requeue", "chdir")]
        return ", ".join(f"{key}={said[key]}" for key in (*keys, *own) if key in said)

    def _known(self) -> dict[str, str]:
        path = self.folder / "jobs.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _keep(self, known: dict[str, str]) -> None:
        scratch = self.folder / f".jobs.{os.getpid()}"
        scratch.write_text(json.dumps(known, indent=1) + "\n")
        scratch.replace(self.folder / "jobs.json")

    def _look(self) -> None:
        """Reads the queue, now and then. What it said last stays while SLURM does not answer."""
        if time.monotonic() - self._looked < _EVERY:
            return
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self._queue = self._squeue()
        self._looked = time.monotonic()
        reasons = Counter(
            said.reason for place, said in self._queue.items()
            if place in self._jobs and said.state == "PENDING"
        )  # fmt: skip
        for reason in reasons.keys() - _PATIENT - self._mentioned:
            self._mentioned.add(reason)
            print(f"SLURM: {reasons[reason]} jobs wait: {reason}", flush=True)

    def _squeue(self) -> dict[str, Queued]:
        """The jobs of this sweep that SLURM remembers, by id. Those of others are told by their
        script: the ids of another cluster, or of a new one, may be the same.
        """
        command = ["squeue", "--noheader", "--array", "--all", "--states=all"]
        command += [f"--user={os.getuid()}", "--format=%i|%T|%r|%o"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        lines = (line.strip().split("|", 3) for line in done.stdout.splitlines())
        return {
            line[0]: Queued(line[1], line[2])
            for line in lines
            if len(line) == 4 and Path(line[3]).parent == self.folder
        }


@contextlib.contextmanager
def _as_outside() -> Iterator[None]:
    """Hides the job that this process may itself be in: its limits would be at odds with ours."""
    prefixes = ("SLURM_", "SLURMD_", "SUBMITIT_") if "SLURM_JOB_ID" in os.environ else ()
    names = [name for name in os.environ if name.startswith(prefixes) and name != "SLURM_CONF"]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _note_end(job: Job, place: str, said: Queued, folder: Path) -> None:
    """Adds to a job's log what SLURM knows of its end, and what it said before it had a log."""
    if job.state() == "done":
        return
    path = folder / f"{place}_0_log.out"
    early = path.read_text(errors="replace").splitlines() if path.is_file() else []
    printed = job.log.read_text(errors="replace") if job.log.is_file() else ""
    lines = [] if f"SLURM job {place} " in printed else early[-20:]  # it never came so far
    why = said.reason
    if said.state == "FAILED" and why == "NonZeroExitCode":
        ends = [found[1] for line in early if (found := _END.search(line))]
        why = ends[-1] if ends else "Exited"
    if not why.startswith("Exited"):  # else its own words say more
        words = said.state.lower().replace("_", " ")
        reason = f" ({why})" if why not in ("", "None") else ""
        lines.append(f"--- error: SLURM: job {place} {words}{reason}")
    if lines:
        with contextlib.suppress(OSError):  # a full disk, which is told anyway
            job.path.mkdir(parents=True, exist_ok=True)
            with job.log.open("a") as log:
                print("\n".join(lines), file=log)


def _words(said: str) -> str:
    """What a command of SLURM complained of, in a line."""
    return "; ".join(re.sub(r"^\w+: (error|fatal): ", "", line) for line in said.splitlines())


def _largest_array() -> int:
    command = ["scontrol", "show", "config"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return _LARGEST_ARRAY
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", said, re.MULTILINE)
    return max(1, int(found[1])) if found else _LARGEST_ARRAY


def _cut(jobs: Sequence[Job], size: int) -> list[Sequence[Job]]:
    return [jobs[first : first + size] for first in range(0, len(jobs), size)]


def _check_at_once(value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"launcher.at_once={value}: must be a whole number, at least 1, or null")
