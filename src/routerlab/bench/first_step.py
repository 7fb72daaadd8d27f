"""A callback that says when a run took its first step: light, as it is part of what it times."""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class FirstStep(pl.Callback):
    """Writes to ``file`` when it was built (after data, model and their checks), set up (after run
    directory, loggers and trainer), and when the first step was taken: on the clock of the wall and
    on that of its process.
    """

    def __init__(self, file: str) -> None:
        self._file, self._marks = Path(file), {}
        self._mark("built")

    def setup(self, *_: Any, **__: Any) -> None:
        """Loggers run, data are open."""
        self._mark("set up")

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """A step was taken."""
        if "stepped" not in self._marks:
            self._mark("stepped")
            self._file.write_text(json.dumps(self._marks))

    def _mark(self, name: str) -> None:
        self._marks[name] = (time.time(), time.process_time())
