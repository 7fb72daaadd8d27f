"""Offline runs of W&B, read back with its own client."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLIENT = Path(sys.executable).with_name("wandb")


@dataclass
class Segment:
    """What one process of a run left behind."""

    run: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """As it was sent when the run began."""
        return self.run["config"]["update"]


def segments(directory: Path) -> list[Segment]:
    """The offline runs of a run directory, in the order of time."""
    return [read(path) for path in sorted((directory / "wandb").glob("offline-run-*"))]


def read(folder: Path) -> Segment:
    """The records in the folder of one offline run."""
    found = Segment()
    for line in _client("leet", "inspect", "--json", str(folder)).splitlines():
        record = json.loads(line)
        if record["type"] == "run":
            found.run = record["run"]
        elif record["type"] == "history":
            found.history.append(record["history"]["item"])
    summary = _client("leet", "inspect", "--summary", "--json", str(folder))
    found.summary = json.loads(summary)["summary"]
    return found


def _client(*words: str) -> str:
    done = subprocess.run([CLIENT, *words], capture_output=True, text=True, check=True)
    return done.stdout
