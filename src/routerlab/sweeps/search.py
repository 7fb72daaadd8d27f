"""Where the jobs of a sweep come from: all at once, or the next ones from the results before."""

import random
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from routerlab.sweeps.grammar import Choice, Interval
from routerlab.sweeps.jobs import Job


@runtime_checkable
class Source(Protocol):
    """The jobs of a sweep, in the order in which they are to be trained."""

    @property
    def total(self) -> int:
        """Jobs in all."""
        ...

    def preview(self) -> list[Job]:
        """The jobs that can be told before any has ended; writes nothing."""
        ...

    def ask(self) -> list[Job]:
        """The jobs that can be handed over now, each once; among them those that an earlier call of
        the same sweep has done already, of which it wants to be told, too.
        """
        ...

    def tell(self, job: Job) -> None:
        """A job has ended; its directory says how."""
        ...

    def done(self) -> bool:
        """Whether `ask` will give nothing more."""
        ...


class Listed:
    """Jobs that are all known beforehand: a grid, or points drawn at random."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs, self._asked = list(jobs), False

    @property
    def total(self) -> int:
        """Jobs in all."""
        return len(self._jobs)

    def preview(self) -> list[Job]:
        """All jobs."""
        return list(self._jobs)

    def ask(self) -> list[Job]:
        """All jobs, the first time."""
        jobs = [] if self._asked else self._jobs
        self._asked = True
        return list(jobs)

    def tell(self, job: Job) -> None:
        """Nothing depends on it."""

    def done(self) -> bool:
        """Whether the jobs were handed over."""
        return self._asked


def draw(space: Sequence[Choice | Interval], group: str, trial: int) -> tuple[str, ...]:
    """The words of a random trial: a function of the group, the key and the number of the trial
    alone, so that every combination of a sweep, and every later call, tries the same.
    """
    return tuple(d.draw(random.Random(f"{group}/{d.key}/{trial}").random()) for d in space)
