"""Jobs for tests of sweeps: real processes of milliseconds, which leave what a run leaves."""

import csv
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from routerlab.sweeps.jobs import Job

_PRELUDE = """
import json, os, pathlib, signal, sys, time
from datetime import UTC, datetime
path = pathlib.Path(sys.argv[1])

def write(state, **more):
    (path / "config.yaml").write_text("seed: 0")
    (path / "environment.json").write_text("{}")
    now = datetime.now(UTC).isoformat()
    (path / "status.json").write_text(json.dumps({"state": state, "at": now, **more}))

def done(bits):
    summary = {"train_seconds": 0.01, "val": {"bits_per_byte": bits}}
    (path / "summary.json").write_text(json.dumps(summary))
    write("done")
"""


@dataclass(frozen=True)
class Script(Job):
    """A job whose process runs ``code``, which may call ``write(state)`` and ``done(bits)``."""

    code: str = "done(2.0)"

    def command(self) -> list[str]:
        return [sys.executable, "-c", _PRELUDE + self.code, str(self.path)]


def finished(path: Path, bits: float, **config: object) -> Path:
    """A run directory as a finished run leaves it."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"seed": 0, **config}))
    (path / "status.json").write_text(json.dumps({"state": "done"}))
    summary = {"train_seconds": 30.0, "val": {"bits_per_byte": bits}}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def wait_for(what: Callable[[], object], seconds: float = 120.0) -> None:
    """Returns once ``what()`` is true; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process lives, and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def children(pid: int) -> list[int]:
    """The processes that ``pid`` started and that live."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def without_timing(metrics: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv without the columns that depend on the clock."""
    with metrics.open(newline="") as file:
        return [
            {key: value for key, value in row.items() if "per_second" not in key}
            for row in csv.DictReader(file)
        ]
