"""What a task of a job array of SLURM does. It is unpickled there, so little is imported here."""

import contextlib
import json
import os
import signal
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from submitit.helpers import DelayedSubmission

from routerlab.core.config import use_directory
from routerlab.sweeps.jobs import Job
from routerlab.training.preemption import SIGNALS, slurm_job


@dataclass(frozen=True)
class Task:
    """Becomes the process of a run, in each process that SLURM starts for it, each time anew.

    ``folder`` is submitit's; ``config_dirs`` hold the user's own configs.
    """

    job: Job
    folder: Path
    config_dirs: tuple[Path, ...]

    def __call__(self) -> None:
        """Does not return: the command of the job takes this process over, and its log."""
        # The run notes signals itself; those that come before it can wait for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for path in self.config_dirs:
            use_directory(path)
        self.job.path.mkdir(parents=True, exist_ok=True)
        command = [*self._command(), "hydra.mode=RUN"]  # launcher=slurm is done
        log = os.open(self.job.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        if os.environ.get("SLURM_PROCID", "0") == "0":
            now = datetime.now().astimezone().isoformat(" ", "seconds")
            node = os.environ.get("SLURMD_NODENAME")
            about = f"SLURM job {slurm_job()} on {node}"
            print(f"--- {now} ({about}) {' '.join(command[3:])}", flush=True)
        os.execv(command[0], command)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues again after a signal that came before this was called."""
        return DelayedSubmission(self)

    def _command(self) -> list[str]:
        """The job's command, the same for all of its processes: that which the first one of this
        attempt sees. Later ones could find a run that the first has begun by now.
        """
        if os.environ.get("SLURM_NTASKS", "1") == "1":
            return self.job.command()
        attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
        said = self.folder / f"{slurm_job()}_{attempt}_command.json"
        mine = said.with_suffix(f".{os.environ['SLURM_PROCID']}")
        mine.write_text(json.dumps(self.job.command()))
        with contextlib.suppress(FileExistsError):
            os.link(mine, said)
        mine.unlink()
        return json.loads(said.read_text())
