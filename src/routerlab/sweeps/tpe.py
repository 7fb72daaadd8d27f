"""Search by Optuna's tree-structured Parzen estimator. Importing this module imports Optuna."""

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from routerlab.core.config import ConfigError, nearest
from routerlab.core.identity import flat
from routerlab.sweeps.grammar import Choice, Interval
from routerlab.sweeps.jobs import Job
from routerlab.training.run_directory import RunDirectory

_AT_RANDOM = 10  # trials of a study before the estimator has enough to go by
_PREFERRED = ("bits_per_byte", "accuracy", "loss")

# From the words that a trial draws to its jobs, one a seed.
Jobs = Callable[[tuple[str, ...]], list[Job]]


@dataclass
class _Trial:
    study: optuna.Study
    number: int
    jobs: list[Job]


class TpeSearch:
    """A study of ``trials`` trials for each of ``combinations``, by name. Results are kept in the
    file ``journal``; opened again, it goes on where it was.

    At least ``at_once`` jobs are under way while there are trials left. What is drawn depends on
    the number of the trial and on the results so far. A trial's value is the mean of ``metric`` (a
    key below ``val`` of ``summary.json``; null: bits per byte, accuracy or loss) over its jobs;
    accuracies are maximised, all else minimised. If one of its jobs fails, the trial stays open in
    the journal, and the next call tries it again.
    """

    def __init__(
        self,
        journal: Path,
        combinations: Mapping[str, Jobs],
        space: Sequence[Choice | Interval],
        trials: int,
        metric: str | None,
        at_once: int,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._journal, self._combinations, self._space = journal, combinations, space
        self._trials, self._metric, self._at_once = trials, metric, at_once
        self._studies: dict[str, optuna.Study] = {}
        self._open: list[_Trial] = []
        self._handed: set[Path] = set()
        self._ended: set[Path] = set()
        self._repeated = 0
        self._preview = self._first_trials()

    @property
    def total(self) -> int:
        """Jobs in all; fewer than expected where a trial draws what another has drawn."""
        seeds = len(self._preview[0].jobs)
        return self._trials * len(self._combinations) * seeds - self._repeated

    def preview(self) -> list[Job]:
        """The jobs of the trials that are drawn at random."""
        return list({job.path: job for trial in self._preview for job in trial.jobs}.values())

    def ask(self) -> list[Job]:
        """The first time, those of the journal, done ones too; then as many as are wanted."""
        found = [] if self._studies else self._resume()
        self._settle()
        while self._under_way() < self._at_once and (name := self._next()) is not None:
            found += self._hand_out(self._draw(name, self._studies[name]))
            self._settle()
        return found

    def tell(self, job: Job) -> None:
        """Closes the trial if this was its last job."""
        self._ended.add(job.path)
        self._settle()

    def done(self) -> bool:
        """Whether every trial was handed out, and none is open."""
        return bool(self._studies) and not self._open and self._next() is None

    def _first_trials(self) -> list[_Trial]:
        studies = self._create(InMemoryStorage())
        numbers = range(min(self._trials, _AT_RANDOM))
        return [self._draw(name, study) for _ in numbers for name, study in studies.items()]

    def _resume(self) -> list[Job]:
        self._studies = self._create(_storage(self._journal))
        jobs = []
        keys = {dimension.key for dimension in self._space}
        for name, study in self._studies.items():
            for trial in _trials(study):
                if keys - set(trial.params):  # we were killed while it was drawn
                    study.tell(trial.number, state=TrialState.FAIL)
            for trial in _trials(study)[: self._trials]:
                known = self._of(name, study, trial.number, trial.params)
                jobs += self._hand_out(known, trial.state == TrialState.RUNNING)
        return jobs

    def _create(self, storage: BaseStorage) -> dict[str, optuna.Study]:
        names = self._combinations
        return {
            name: optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
            for name in names
        }

    def _next(self) -> str | None:
        """The combination that has had the fewest trials, if any has some left."""
        counts = {name: len(_trials(study)) for name, study in self._studies.items()}
        name = min(counts, key=lambda name: counts[name])
        return name if counts[name] < self._trials else None

    def _draw(self, name: str, study: optuna.Study) -> _Trial:
        number = len(study.get_trials(deepcopy=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # A sampler of its own: one that begins anew at every call would repeat its draws.
            study.sampler = optuna.samplers.TPESampler(
                seed=_seed(self._journal.parent.name, number),
                n_startup_trials=_AT_RANDOM,
                multivariate=True,
                constant_liar=True,  # else trials at the same time would crowd together
            )
        trial = study.ask({dimension.key: _distribution(dimension) for dimension in self._space})
        return self._of(name, study, trial.number, trial.params)

    def _of(self, name: str, study: optuna.Study, number: int, params: Mapping[str, Any]) -> _Trial:
        words = tuple(_word(dimension, params[dimension.key]) for dimension in self._space)
        return _Trial(study, number, self._combinations[name](words))

    def _hand_out(self, trial: _Trial, is_open: bool = True) -> list[Job]:
        fresh = [job for job in trial.jobs if job.path not in self._handed]
        self._repeated += len(trial.jobs) - len(fresh)
        self._handed |= {job.path for job in fresh}
        if is_open:
            self._open.append(trial)
        return fresh

    def _under_way(self) -> int:
        paths = {job.path for trial in self._open for job in trial.jobs}
        return len(paths - self._ended)

    def _settle(self) -> None:
        """Closes the trials of which every job has ended, or was done by an earlier call."""
        for trial in list(self._open):
            states = {job.path: job.state() for job in trial.jobs}
            if not all(path in self._ended or state == "done" for path, state in states.items()):
                continue
            self._open.remove(trial)
            if set(states.values()) == {"done"}:
                values = [_value(job, self._metric) for job in trial.jobs]
                if math.isfinite(mean := sum(values) / len(values)):
                    trial.study.tell(trial.number, mean)


def _trials(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.FAIL]


def _storage(journal: Path) -> JournalStorage:
    journal.parent.mkdir(parents=True, exist_ok=True)
    if journal.is_file():  # a process that is killed may leave half a line, and Optuna's own lock
        text = journal.read_bytes()
        if len(whole := text[: text.rfind(b"\n") + 1]) < len(text):
            journal.write_bytes(whole)
        Path(f"{journal}.lock").unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(str(journal)))


def _distribution(dimension: Choice | Interval) -> BaseDistribution:
    if isinstance(dimension, Choice):
        if dimension.ordered:
            return IntDistribution(0, len(dimension.words) - 1)
        return CategoricalDistribution(dimension.words)
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _word(dimension: Choice | Interval, drawn: Any) -> str:
    if isinstance(dimension, Interval):
        return dimension.word(drawn)
    return dimension.words[drawn] if dimension.ordered else drawn


def _seed(group: str, number: int) -> int:
    return int.from_bytes(hashlib.sha1(f"{group}/{number}".encode()).digest()[:4])


def _value(job: Job, metric: str | None) -> float:
    """The metric of a done job, with its sign such that lower is better."""
    found = flat((RunDirectory(job.path).read_json("summary.json") or {}).get("val", {}))
    numbers = {k: v for k, v in found.items() if isinstance(v, int | float)}
    wanted = [metric.replace("/", ".").removeprefix("val.")] if metric else _PREFERRED
    key = next((key for key in wanted if key in numbers), None)
    if key is None:
        raise ConfigError(
            f"metric {metric or 'loss'!r}: {job.path.name} has none of that name in its "
            f"validation; {nearest(metric or 'loss', numbers)}"
        )
    return -numbers[key] if "accuracy" in key.rsplit(".", 1)[-1] else numbers[key]
