"""A SLURM for tests, brought up by slurm/dev_cluster.sh."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = ROOT / "slurm" / "dev_cluster.sh"


def installed() -> bool:
    """Whether Debian's packages slurm-wlm and munge are here."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return all(shutil.which(name, path=path) for name in ("slurmctld", "slurmd", "munged"))


@contextlib.contextmanager
def cluster() -> Iterator[Path]:
    """Its folder. Each node claims 64 cores. Jobs and this process have one thread: with different
    numbers of them, runs are not equal to the last bit.
    """
    if not installed():
        pytest.skip("needs a SLURM (Debian: apt-get install slurm-wlm munge)")
    with (
        tempfile.TemporaryDirectory(prefix="rl-slurm-") as folder,
        pytest.MonkeyPatch.context() as m,
    ):
        m.setenv("CPUS", "64")
        said = tell("up", folder)
        m.setenv("SLURM_CONF", said.split("SLURM_CONF=")[1].strip())
        m.setenv("OMP_NUM_THREADS", "1")
        m.setenv("MASTER_ADDR", "127.0.0.1")  # the names of its nodes are known to SLURM alone
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield Path(folder)
        finally:
            torch.set_num_threads(threads)
            tell("down", folder)


def tell(*words: str) -> str:
    """What slurm/dev_cluster.sh prints."""
    done = subprocess.run([_SCRIPT, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def slurm(*words: str) -> str:
    """What a command of SLURM prints."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout.strip()


def queue() -> dict[str, str]:
    """The state of each job that has not ended, by id."""
    lines = slurm("squeue", "--noheader", "--array", "--format=%i|%T").splitlines()
    return dict(line.split("|") for line in lines)
