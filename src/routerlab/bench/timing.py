"""Ratios of times on a machine whose speed drifts: every sample stands between two baselines."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

Clock = Callable[[], float]
Work = Callable[[], object]

MIN_ROUNDS = 3
MAX_WAIT = 0.03  # share of a sample's time that its threads may have waited for a core


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds that one run took, and seconds that its threads stood in line for a core."""

    seconds: float
    waited: float = 0.0

    @property
    def quiet(self) -> bool:
        """No other process was in the way."""
        return self.waited <= MAX_WAIT * self.seconds


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median and quartiles of ``samples`` pairwise ratios, and the median time itself.

    ``busy`` counts ratios that were dropped because another process was in the way; where too few
    would be left none is dropped, and ``samples`` includes them.
    """

    median: float
    lower: float
    upper: float
    milliseconds: float
    samples: int
    busy: int


class Stopwatch:
    """Takes a `Sample` of what this process does between `start` and `stop`."""

    def __init__(
        self, device: torch.device | None = None, clock: Clock = time.perf_counter
    ) -> None:
        self._device, self._clock = device, clock
        self.start()

    def start(self) -> None:
        """From here."""
        _synchronize(self._device)
        self._waited, self._start = _waited(), self._clock()

    def stop(self) -> Sample:
        """To here."""
        _synchronize(self._device)
        return Sample(self._clock() - self._start, _waited() - self._waited)


def interleave(
    contestants: Mapping[str, Work],
    baseline: Work,
    prepare: Work,
    seconds: float,
    device: torch.device | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, Ratio], float]:
    """The ratio of each contestant to the baseline, and the baseline's median milliseconds.

    One round is ``B c1 B c2 B ...``, and the B that ends a round begins the next. ``prepare`` runs
    before every sample and is not timed. Rounds go on for ``seconds`` a contestant, at least
    `MIN_ROUNDS`, after one round that only warms up.
    """
    if seconds <= 0:
        raise ValueError(f"seconds={seconds}: must be above 0")

    stopwatch = Stopwatch(device, clock)

    def sample(work: Work) -> Sample:
        prepare()
        stopwatch.start()
        work()
        return stopwatch.stop()

    around: dict[str, list[tuple[Sample, Sample, Sample]]] = {name: [] for name in contestants}
    with _no_garbage_collection():
        for work in (baseline, *contestants.values()):
            sample(work)
        baselines = [sample(baseline)]
        end, rounds = clock() + seconds * len(contestants), 0
        while rounds < MIN_ROUNDS or clock() < end:
            for name, work in contestants.items():
                middle = sample(work)
                baselines.append(sample(baseline))
                around[name].append((baselines[-2], middle, baselines[-1]))
            rounds += 1
    found = {name: summary(triples) for name, triples in around.items()}
    return found, statistics.median(s.seconds for s in baselines) * 1000


def summary(triples: Sequence[tuple[Sample, Sample, Sample]]) -> Ratio:
    """Of (baseline, sample, baseline): sample over the mean of its two neighbours, and of these
    ratios the median and quartiles (inclusive method).
    """
    quiet = [triple for triple in triples if all(sample.quiet for sample in triple)]
    used = quiet if len(quiet) >= MIN_ROUNDS else triples
    ratios = [s.seconds / ((b.seconds + a.seconds) / 2) for b, s, a in used]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    milliseconds = statistics.median(sample.seconds for _, sample, _ in used) * 1000
    return Ratio(median, lower, upper, milliseconds, len(used), len(triples) - len(used))


def _waited() -> float:
    """Seconds that this process's threads were ready to run and had no core (Linux; else 0)."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError):  # the thread ended meanwhile
            continue
    return total / 1e9


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The collector stops at moments of its own; what it would find is collected before."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
