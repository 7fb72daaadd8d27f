"""Turns the words in which the runs of a sweep differ into jobs."""

import copy
import re
from collections.abc import Iterable, Sequence
from hashlib import sha1
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from routerlab.core.config import ConfigError, compose, config_dir, explain, user_dirs
from routerlab.core.identity import identity
from routerlab.sweeps import grammar
from routerlab.sweeps.jobs import Job

_SUMMARY_LENGTH = 80  # of what varies, in a directory's name


class JobMaker:
    """Makes the jobs of a plan, from the words in which they differ."""

    def __init__(self, plan: grammar.Plan, name: str | None, combination: tuple[str, ...]) -> None:
        self._plan, self._compose = plan, Composer(plan.fixed)
        self._repeated = 0
        axes = [*plan.axes, plan.seeds] if len(plan.seeds.words) > 1 else plan.axes
        self._short = _short_keys([part.key for part in (*axes, *plan.drawn)])
        self.cfg = self._compose(self._first(combination))
        self.group = str(self.cfg.group or name or self.cfg.name)
        if re.search(r"[/\\]|^\.", self.group):
            raise ConfigError(
                f"group={self.group}: must be the name of a folder, without / or a dot"
            )
        output = Path(self.cfg.paths.output_dir).expanduser()
        self.folder = output.resolve() / "sweeps" / self.group
        self._there = _directories(self.folder)

    def job(self, own: Sequence[str]) -> Job:
        """The job with these words."""
        own = tuple(word for word in own if word)
        title = " ".join(map(self._title, own)) or str(self.cfg.name)
        key = self._identity(self._compose(own), own)
        summary = re.sub(r"[^\w.+]+", "-", title.replace(" ", "_"))[:_SUMMARY_LENGTH]
        path = self._there.setdefault(key, f"{summary.strip('-_.')}_{key}")
        words = [w for w in self._plan.fixed if grammar.key_of(w) != "group"]
        group = f"group={grammar.literal(self.group)}"
        return Job(title, self.folder / path, (*words, *own, group))

    def unique(self, jobs: Iterable[Job]) -> list[Job]:
        """Jobs of different experiments."""
        found: dict[Path, Job] = {}
        for job in jobs:
            self._repeated += found.setdefault(job.path, job) is not job
        return list(found.values())

    def notes(self) -> tuple[str, ...]:
        """Remarks for the user."""
        if not self._repeated:
            return ()
        return (f"{self._repeated} jobs are the same experiment as others: each is trained once",)

    def check(self, combination: tuple[str, ...]) -> None:
        """Composes every choice that a trial may draw."""
        first = self._first(combination)
        for place, drawn in enumerate(self._plan.drawn, len(combination)):
            for word in drawn.words if isinstance(drawn, grammar.Choice) else ():
                self._compose((*first[:place], word, *first[place + 1 :]))

    def study(self, combination: tuple[str, ...], metric: str | None) -> str:
        """The name of a combination's search: another one whenever results cannot be compared."""
        first = self._first(combination)
        same = (self._identity(self._compose(first), first), self._plan.drawn, self._plan.seeds)
        digest = sha1(repr((*same, metric)).encode()).hexdigest()[:10]
        return " ".join([*map(self._title, combination), digest])

    def _first(self, combination: tuple[str, ...]) -> tuple[str, ...]:
        drawn = (part.draw(0.0) for part in self._plan.drawn)
        return tuple(filter(None, [*combination, *drawn, self._plan.seeds.words[0]]))

    def _title(self, word: str) -> str:
        key, _, value = word.partition("=")
        return f"{self._short[key]}={value.strip(chr(39) + chr(34))}"

    def _identity(self, cfg: DictConfig, own: Sequence[str]) -> str:
        try:
            return identity(cfg)
        except OmegaConfBaseException as error:
            raise ConfigError(str(explain(error, [*self._plan.fixed, *own]))) from error


class Composer:
    """Configs of many jobs that share words. Each choice of files is composed once, which takes
    most of the time, and the values that differ are set in a copy.
    """

    def __init__(self, shared: Sequence[str]) -> None:
        self._shared = shared
        roots = (config_dir(), *user_dirs())
        self._groups = {path.name for root in roots for path in root.iterdir() if path.is_dir()}
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, own: Sequence[str]) -> DictConfig:
        """The same config as `compose` makes of the shared words and ``own``."""
        values = [word for word in own if self._sets_value(word)]
        files = tuple(word for word in own if word not in values)
        if files not in self._composed:
            self._composed[files] = self._whole(files)
        cfg = copy.deepcopy(self._composed[files])
        try:
            for word in values:
                OmegaConf.update(cfg, grammar.key_of(word), grammar.value_of(word), merge=True)
        except OmegaConfBaseException:
            return self._whole(own)  # which says what is wrong
        return cfg

    def _whole(self, own: Sequence[str]) -> DictConfig:
        try:
            return compose(*self._shared, *own)
        except ConfigError:
            raise
        except ValueError as error:  # of hydra, which does not say where
            raise ConfigError(f"{' '.join((*self._shared, *own))}: {error}") from error

    def _sets_value(self, word: str) -> bool:
        return grammar.sets_value(word) and grammar.key_of(word) not in self._groups


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last parts, as many as tell it from the others."""
    parts = {key: re.split(r"[./]", key.lstrip("+")) for key in keys}

    def ends(count: int) -> dict[str, str]:
        return {key: ".".join(part[-count:]) for key, part in parts.items()}

    short = {}
    for key, part in parts.items():
        counts = range(1, len(part) + 1)
        alone = (n for n in counts if list(ends(n).values()).count(ends(n)[key]) == 1)
        short[key] = ends(next(alone, len(part)))[key]
    return short


def _directories(folder: Path) -> dict[str, str]:
    """Names of the runs that are there, by identity, whatever varied when they were begun."""
    if not folder.is_dir():
        return {}
    found = sorted(folder.iterdir(), key=lambda path: (path / "config.yaml").is_file())
    return {path.name.rsplit("_", 1)[-1]: path.name for path in found if path.is_dir()}
