"""What a sweep is: words on a command line, or a file in ``configs/sweep``, turned into jobs."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from routerlab.core.config import ConfigError, available, config_dir, nearest, user_dirs
from routerlab.sweeps import grammar
from routerlab.sweeps.grammar import MOST_JOBS, Plan
from routerlab.sweeps.job_maker import JobMaker
from routerlab.sweeps.jobs import Job
from routerlab.sweeps.search import Listed, Source, draw

_SEARCHES = ("random", "tpe")
_OF_HYDRA = ("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper", "hydra.sweep")
_JOURNAL = "search.journal"  # of Optuna
_JOBS_AT_ONCE = 8  # of a search on a cluster that says no number


@dataclass(frozen=True)
class Sweep:
    """Jobs of one ``group``, whose directories lie in ``folder`` (absolute). ``cfg`` is the config
    of the first. ``notes`` are remarks for the user.
    """

    group: str
    folder: Path
    cfg: DictConfig
    source: Source
    notes: tuple[str, ...] = ()


def read(
    words: Sequence[str],
    trials: int | None = None,
    search: str = "random",
    metric: str | None = None,
) -> Sweep:
    """The sweep that overrides make, ``sweep=NAME`` among them: plain lists, globs and (without
    ``trials``) ``choice()`` and ``range()`` are crossed, all configs of the first seed first.

    With ``trials``, every combination has that many trials, whose ``choice()``, ``range()`` and
    ``interval()`` are drawn, at random or by ``search="tpe"``, which looks for the best ``metric``
    (see `routerlab.sweeps.tpe.TpeSearch`). Each trial is run with every seed.

    Composes every job that can be known, so that wrong words raise `ConfigError` here; writes
    nothing.
    """
    if trials is not None and trials < 1:
        raise ConfigError(f"--trials={trials}: must be at least 1")
    if search not in _SEARCHES:
        raise ConfigError(f"--search={search}: no such search; {nearest(search, _SEARCHES)}")
    if search == "tpe" and trials is None:
        raise ConfigError("--search=tpe: say how many trials, with --trials N")
    if metric is not None and search != "tpe":
        raise ConfigError(f"--metric={metric}: only --search tpe looks for the best value")
    plan, name = _plan(words, trials is not None)
    if trials is not None and not plan.drawn:
        raise ConfigError(
            f"--trials={trials}: nothing to draw; write choice(), range() or interval() for a key"
        )
    combinations = _combinations(plan, trials or 1)
    jobs = JobMaker(plan, name, combinations[0])
    if search == "tpe":
        source = _tpe(jobs, plan, combinations, trials or 1, metric)
    else:
        source = Listed(_listed(jobs, plan, combinations, trials))
    return Sweep(jobs.group, jobs.folder, jobs.cfg, source, jobs.notes())


def sweep_file(name: str) -> Path:
    """The file of a sweep. Raises `ConfigError` for an unknown name."""
    for root in (*reversed(user_dirs()), config_dir()):
        if (path := root / "sweep" / f"{name}.yaml").is_file():
            return path
    raise ConfigError(f"sweep={name}: no such sweep; {nearest(name, available('sweep'))}")


def _plan(words: Sequence[str], searching: bool) -> tuple[Plan, str | None]:
    """What varies, and the name of the sweep's file, if there is one."""
    ours = {word: grammar.key_of(word) for word in words}
    for word, key in ours.items():
        _refuse(word, key)
    names = [word for word, key in ours.items() if key == "sweep"]
    said = [word for word in words if ours[word] != "sweep"]
    keys = [ours[word] for word in said]
    for word in said:
        if keys.count(ours[word]) > 1 and grammar.varies(word):
            raise ConfigError(f"{word}: {ours[word]} is given twice")
    if len(names) > 1 or any(map(grammar.varies, names)):
        raise ConfigError(f"{' '.join(names)}: one sweep at a time")
    if not names:
        return grammar.parse(said, searching), None
    name = str(grammar.value_of(names[0]))
    from_file = [word for word in _file_words(sweep_file(name)) if grammar.key_of(word) not in keys]
    return grammar.parse([*from_file, *said], searching), name


def _refuse(word: str, key: str) -> None:
    if key in ("run_dir", "resume"):
        raise ConfigError(
            f"{word}: a sweep gives each run a directory of its own, and goes on with those that "
            "were cut when it is started again with the same words"
        )
    if key == "hydra.mode" or any(key == k or key.startswith(f"{k}.") for k in _OF_HYDRA):
        raise ConfigError(
            f"{word}: sweeps are not hydra's; choose launcher=local or launcher=slurm, and "
            "--trials N to search"
        )
    if key == "group" and grammar.varies(word):
        raise ConfigError(f"{word}: a sweep is one group")


def _file_words(path: Path) -> list[str]:
    """The words that a file of a sweep stands for."""
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(plain, dict) or not plain:
        raise ConfigError(f"{path}: must map keys to what to vary, such as seed: 0,1,2")
    words = []
    for key, value in plain.items():
        if isinstance(value, dict) or value == []:
            raise ConfigError(f"{path}: {key}: give a value, a list of values, or a string")
        if isinstance(value, str):
            text = value
        elif isinstance(value, list):
            text = ",".join(map(grammar.literal, value))
        else:
            text = grammar.literal(value)
        words.append(word := f"{key}={text}")
        _refuse(word, grammar.key_of(word))
        if grammar.key_of(word) == "sweep":
            raise ConfigError(f"{path}: {word}: a sweep holds no other sweep")
    return words


def _combinations(plan: Plan, trials: int) -> list[tuple[str, ...]]:
    """The words of every combination of the axes, the seeds apart."""
    count = math.prod(len(axis.words) for axis in (*plan.axes, plan.seeds)) * trials
    if count > MOST_JOBS:
        sizes = ", ".join(f"{len(axis.words)} {axis.key}" for axis in (*plan.axes, plan.seeds))
        raise ConfigError(f"{count:,} jobs ({sizes}): at most {MOST_JOBS:,} in a sweep")
    return list(itertools.product(*(axis.words for axis in plan.axes)))


def _listed(
    jobs: JobMaker, plan: Plan, combinations: Sequence[tuple[str, ...]], trials: int | None
) -> list[Job]:
    """Every job of a grid or of a random search, each once."""
    drawn = [draw(plan.drawn, jobs.group, trial) for trial in range(trials or 1)]
    return jobs.unique(
        jobs.job((*combination, *words, seed))
        for seed in plan.seeds.words
        for words in drawn
        for combination in combinations
    )


def _tpe(
    jobs: JobMaker,
    plan: Plan,
    combinations: Sequence[tuple[str, ...]],
    trials: int,
    metric: str | None,
) -> Source:
    try:
        from routerlab.sweeps.tpe import TpeSearch
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--search=tpe: {error.name} is not installed: pip install 'routerlab[search]'"
        ) from error

    def of(combination: tuple[str, ...]) -> Callable[[tuple[str, ...]], list[Job]]:
        return lambda drawn: jobs.unique(
            jobs.job((*combination, *drawn, seed)) for seed in plan.seeds.words
        )

    makers = {}
    for combination in combinations:
        jobs.check(combination)
        makers[jobs.study(combination, metric)] = of(combination)
    count = len(combinations) * len(plan.seeds.words) * trials
    at_once = _at_once(jobs.cfg, jobs.folder, count)
    return TpeSearch(jobs.folder / _JOURNAL, makers, plan.drawn, trials, metric, at_once)


def _at_once(cfg: DictConfig, folder: Path, jobs: int) -> int:
    """How many jobs keep the launcher busy."""
    if "workers" in cfg.launcher:
        from routerlab.sweeps.local import from_config

        return from_config(cfg, folder, jobs).workers
    return cfg.launcher.get("at_once") or _JOBS_AT_ONCE
