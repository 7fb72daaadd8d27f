"""A run's directory: everything that a run leaves behind, as plain files."""

import contextlib
import json
import os
import re
import tempfile
import traceback
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from routerlab.core.config import ConfigError, choices

_SUMMARY_LENGTH = 60  # of the overrides in a directory's name
_UNSAID = (
    "experiment=", "run_dir=", "paths.", "hydra.", "logger", "callback", "pretrain", "init_from=",
    "bank=", "embedder=", "baselines", "+baselines",
)  # fmt: skip


class RunDirectory:
    """``config.yaml``, ``overrides.yaml``, ``choices.yaml``, ``environment.json``, ``status.json``,
    ``summary.json``, ``metrics.csv``, ``distributions.jsonl``, ``checkpoints/``, ``traces/`` and
    ``report.html``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def new(
        cls, output_dir: Path, name: str, overrides: Sequence[str], at: str | None
    ) -> "RunDirectory":
        """An empty directory: ``at``, or else ``<output_dir>/<name>/<when>_<id>_<overrides>``.

        A given directory that holds a run already, or that cannot be written, is refused.
        """
        when = datetime.now(UTC).strftime("%Y-%m-%d_%H-%M-%S")
        said = [word.split("=", 1) for word in overrides if not word.startswith(_UNSAID)]
        words = "_".join("=".join([key.rsplit(".", 1)[-1], *value]) for key, *value in said)
        # Nothing that hydra would want quoted in init_from=PATH.
        summary = re.sub(r"[^\w.+]+", "-", words)[:_SUMMARY_LENGTH]
        title = "_".join(filter(None, [when, uuid.uuid4().hex[:6], summary]))
        path = Path(at).expanduser() if at else output_dir.expanduser() / name / title
        run = cls(path)
        run.refuse_a_second()
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ConfigError(f"run directory {str(path)!r} cannot be written: {error}") from error
        return cls(path.resolve())

    def refuse_a_second(self) -> None:
        """Raises `ConfigError` if the directory holds a run already."""
        if (self.path / "config.yaml").exists():
            raise ConfigError(
                f"run_dir={str(self.path)!r} already holds a run; continue it with "
                f"resume={self.path}, or choose another directory"
            )

    @classmethod
    def existing(cls, path: str | Path) -> "RunDirectory":
        """The directory of a run that was started before."""
        path = Path(path).expanduser().resolve()
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{str(path)!r} holds no run (it has no config.yaml)")
        return cls(path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes from this run; the lock goes with the process, however it ends.

        Raises `ConfigError` if another process holds it for five seconds.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=5)
        except Timeout as error:
            raise ConfigError(
                f"run directory {str(self.path)!r}: another process is training this run"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def is_held(self) -> bool:
        """Whether some process is training this run now."""
        if not (self.path / ".lock").exists():
            return False
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        lock.release()
        return False

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.name

    @property
    def config(self) -> DictConfig:
        """The resolved config that the run was started with."""
        config = OmegaConf.load(self.path / "config.yaml")
        if not isinstance(config, DictConfig):
            raise ConfigError(f"{self.path / 'config.yaml'}: not a config")
        return config

    @property
    def overrides(self) -> list[str]:
        """The command-line words that the run was started with."""
        return list(OmegaConf.to_object(OmegaConf.load(self.path / "overrides.yaml")))  # type: ignore[call-overload]

    @property
    def choices(self) -> dict[str, str]:
        """The file chosen from each config group; of a run that did not keep it, nothing."""
        path = self.path / "choices.yaml"
        return dict(OmegaConf.to_object(OmegaConf.load(path))) if path.is_file() else {}  # type: ignore[call-overload]

    def write_config(self, cfg: DictConfig, overrides: Sequence[str]) -> None:
        """Keeps the words, the config files that they chose, and the resolved config."""
        self._write("overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(list(overrides))))
        self._write("choices.yaml", OmegaConf.to_yaml(OmegaConf.create(choices(overrides))))
        self._write("config.yaml", OmegaConf.to_yaml(cfg, resolve=True))

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file, whole or not at all."""
        self._write(name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, or None if there is none or it cannot be read."""
        try:
            return json.loads((self.path / name).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def set_status(self, state: str, error: BaseException | None = None) -> None:
        """``running``, ``failed`` (with its error), ``preempted`` or ``done``."""
        status: dict[str, Any] = {"state": state, "at": datetime.now(UTC).isoformat()}
        if error is not None:
            status["error"] = f"{type(error).__name__}: {error}"
            status["traceback"] = "".join(traceback.format_exception(error))
        self.write_json("status.json", status)

    def checkpoints(self) -> list[Path]:
        """All checkpoint files, newest first."""
        found = (self.path / "checkpoints").glob("step_*.ckpt")
        return sorted(found, key=lambda p: int(p.stem.removeprefix("step_")), reverse=True)

    def newest_checkpoint(self) -> tuple[Path | None, list[Path]]:
        """The newest readable checkpoint, and newer ones that a crash left truncated."""
        broken = []
        for path in self.checkpoints():
            if zipfile.is_zipfile(path):  # its directory is at the end: a truncated file has none
                return path, broken
            broken.append(path)
        return None, broken

    def _write(self, name: str, text: str) -> None:
        path = self.path / name
        scratch = path.with_name(f".{name}.{os.getpid()}")
        scratch.write_text(text)
        scratch.replace(path)
