"""`Run`: what a run left behind, wherever it lies. Broken ones are named and skipped."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from routerlab.core.config import ConfigError, config_dir, user_dirs
from routerlab.core.identity import flat, scientific, within
from routerlab.reports.run_files import last, logged_keys, number, read_metrics, section
from routerlab.training.run_directory import RunDirectory

# Seeds, names, and what is only recorded or done beside.
_NO_SCIENCE = (
    "seed", "data.seed", "backbone.seed", "evaluate_base", "baselines",
)  # fmt: skip
_OF_A_SEED = {"init_from", "adapter.adapt_from"}
_SIGNS = {"choices.yaml", "overrides.yaml", "status.json", "summary.json", "metrics.csv"}
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C it takes a tenth of the time


class BrokenRunError(ValueError):
    """A run that cannot be read: why, in a few words."""


@dataclass(frozen=True, eq=False)
class Run:
    """A run, of a directory or of W&B. Only `metrics` and `logged` read what it logged."""

    name: str
    path: Path | None  # None: it came from W&B
    config: dict[str, Any]  # flat, resolved
    choices: dict[str, str]  # config group -> file: choices["router"]
    state: str  # done, running, failed, preempted, or cut (it died and said nothing)
    summary: dict[str, Any]  # of summary.json
    environment: dict[str, Any]  # of environment.json
    at: str  # when it came into its state, in ISO form
    history: Callable[[], pd.DataFrame] | None = field(default=None, repr=False)  # of W&B

    @property
    def seed(self) -> int:
        """The seed that its config gives."""
        return self.config["seed"]

    @cached_property
    def science(self) -> dict[str, Any]:
        """The config keys that decide on its numbers, but for the seed. Where a path leads to a run
        of the same seed (``.../seed_3``), that number is left out of it.
        """
        found = {k: v for k, v in scientific(self.config).items() if not within(k, _NO_SCIENCE)}
        for key in _OF_A_SEED & found.keys():
            found[key] = re.sub(rf"(seed\W?_?){self.seed}\b", r"\1*", str(found[key]))
        return found

    @cached_property
    def sections(self) -> dict[str, list[str]]:
        """The names right below each section of the config: ``loss``: the losses."""
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for key in self.config:
            parts = key.split(".")
            for place in range(1, len(parts)):
                found[".".join(parts[:place])][parts[place]] = None
        return {section: list(names) for section, names in found.items()}

    def logged(self) -> list[str]:
        """The keys that it logged."""
        if self.history is not None:
            return [key for key in self.history().columns if key != "step"]
        if self.path is None or not (self.path / "metrics.csv").is_file():
            return []
        with (self.path / "metrics.csv").open("rb") as file:
            return [key for key in logged_keys(file.readline()) if key != "step"]

    def metrics(self, *keys: str) -> pd.DataFrame:
        """Column ``step`` and one column for each of ``keys`` that was logged (all, without
        ``keys``), as it was written: `reports.run_files.curve` gives the last value of each step.

        The file is read anew at each call, so ask for several keys at once.
        """
        if self.history is not None:
            frame = self.history()
            return frame.filter(["step", *keys]) if keys else frame
        path = Path() if self.path is None else self.path / "metrics.csv"
        return read_metrics(path, [], keys or None)

    def value(self, metric: str) -> float | None:
        """What the final evaluation gave (``val/bits_per_byte``, ``val/loss``, ``val/accuracy``,
        also of a domain or task: ``val/accuracy/quartz``), else the last value logged. None if
        there is none, or if it is not finite.
        """
        group, _, name = metric.partition("/")
        head, _, part = name.partition("/")
        for place in ((), (f"{head}_by_domain",), ("by_task", part)):
            key = {0: name, 1: part, 2: head}[len(place)]
            found = section(self.summary, "val", *place)
            if group == "val" and key in found:
                return number(found, key)
        return last(self.metrics(metric), metric)


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """The run directories among and below ``paths``, each once; those inside another run
    (``baselines/``, ``pretrain/``) are left out. Half-made ones, without a config, are among them.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        path = path.expanduser()
        if not path.is_dir():
            raise ConfigError(f"{str(path)!r}: no such directory")
        here = _below(path.resolve())
        if not here:
            raise ConfigError(f"{str(path)!r} holds no runs (no config.yaml in it or below)")
        found |= dict.fromkeys(here)
    return list(found)


def _below(path: Path) -> list[Path]:
    whole, half_made = [], []
    for here, folders, files in os.walk(path):
        folder = Path(here)
        if "config.yaml" in files:
            whole.append(folder)
            folders.clear()
        elif _SIGNS & set(files):
            half_made.append(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    above = {parent for folder in whole for parent in folder.parents}
    return sorted(whole + [folder for folder in half_made if folder not in above])


def load_runs(paths: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """The runs among and below ``paths``, and one sentence for each that cannot be read.

    Raises `ConfigError` where a path is no directory or holds no run.
    """
    folders, warnings = find_runs(paths), []
    found = []
    for folder, name in zip(folders, short_names(folders), strict=True):
        try:
            found.append(load_run(folder, name))
        except BrokenRunError as error:
            warnings.append(f"{folder} is skipped: {error}")
    return found, warnings


def load_run(path: Path, name: str | None = None) -> Run:
    """The run in a directory; raises `BrokenRunError` if it is not one, or not whole."""
    config = _yaml(path / "config.yaml")
    if not isinstance(config, dict) or not config:
        raise BrokenRunError("config.yaml holds no config")
    config = flat(config)
    if not isinstance(config.get("seed"), int):
        raise BrokenRunError("config.yaml gives no seed, so it is not a run's")
    status = _json(path / "status.json")
    return Run(
        name=name or path.name,
        path=path,
        config=config,
        choices=_choices(path, config),
        state=_state(path, status),
        summary=_json(path / "summary.json"),
        environment=_json(path / "environment.json"),
        at=str(status.get("at", "")),
    )


def short_names(folders: Sequence[Path]) -> list[str]:
    """As many last parts of each path as tell it from the others, which are all different."""
    names, length = [folder.name for folder in folders], 1
    while max(Counter(names).values(), default=1) > 1:
        length, count = length + 1, Counter(names)
        names = [
            "/".join(folder.parts[-length:]) if count[name] > 1 else name
            for folder, name in zip(folders, names, strict=True)
        ]
    return names


def _state(path: Path, status: dict[str, Any]) -> str:
    state = str(status.get("state", "cut"))
    if state != "running":
        return state
    try:
        return "running" if RunDirectory(path).is_held() else "cut"
    except OSError:  # a lock of someone else's
        return "running"


def _choices(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """By ``choices.yaml``; of older runs by their words, the router at least by its module."""
    if (path / "choices.yaml").is_file():
        found = _yaml(path / "choices.yaml")
        if not isinstance(found, dict):
            raise BrokenRunError("choices.yaml holds no choices")
        return {str(group): str(name) for group, name in found.items()}
    words = _yaml(path / "overrides.yaml") if (path / "overrides.yaml").is_file() else []
    pairs = [str(word).lstrip("+").split("=", 1) for word in words or [] if "=" in str(word)]
    found = {group: name for group, name in pairs if group in _groups() and name.isidentifier()}
    module = str(config.get("router._target_", "")).split(".")[-2:-1]
    return dict(zip(["router"], module, strict=False)) | found


def _groups() -> set[str]:
    roots = [config_dir(), *user_dirs()]
    return {path.name for root in roots for path in root.iterdir() if path.is_dir()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BrokenRunError(f"it has no {path.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenRunError(f"{path.name} cannot be read ({error})") from error


def _yaml(path: Path) -> Any:
    try:
        return yaml.load(_text(path), Loader=_YAML)
    except yaml.YAMLError as error:
        raise BrokenRunError(f"{path.name} is not valid YAML ({_line(error)})") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        if isinstance(error, BrokenRunError):
            raise
        raise BrokenRunError(f"{path.name} is not valid JSON ({_line(error)})") from error
    if not isinstance(found, dict):
        raise BrokenRunError(f"{path.name} holds no JSON object")
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
