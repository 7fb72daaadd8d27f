"""Trains the runs of a study, each in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import yaml

from .definition import Study
from .results import error_of, read_json


@dataclass(frozen=True)
class Job:
    """One run: its arm, its seed, where it lies and the words that start it."""

    arm: str
    seed: int
    path: Path
    words: list[str]
    sources: tuple[Path, ...] = ()  # runs that must be done first

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.path.with_name(f"{self.path.name}.log")

    def state(self) -> str:
        """``new``, ``interrupted`` (it can go on) or ``done``. A run of other words is refused."""
        if not (self.path / "config.yaml").is_file():
            return "new"
        words = yaml.safe_load((self.path / "overrides.yaml").read_text())
        if words != self.words:
            raise ValueError(
                f"{self.path} holds a run of other overrides:\n  it has  {' '.join(words)}\n"
                f"  but now {' '.join(self.words)}\nremove it, or choose another --output"
            )
        return (
            "done" if read_json(self.path / "status.json").get("state") == "done" else "interrupted"
        )

    def command(self) -> list[str]:
        """Starts the run, or goes on with it."""
        words = self.words if self.state() == "new" else [f"resume={self.path}"]
        return [sys.executable, "-m", "routerlab.cli.main", "train", *words]


def plan(study: Study, seeds: Sequence[int], output: Path) -> list[Job]:
    """All runs, one seed after the other: arms with results can be compared early. Arms that build
    on others come after them.
    """
    jobs = []
    for seed in seeds:
        for arm in sorted(study.arms, key=lambda arm: bool(study.sources(arm))):
            path = study.run_path(output.resolve(), arm, seed)
            words = [
                *study.words(arm, output.resolve(), seed),
                f"seed={seed}",
                f"run_dir={path}",
                "logger=[]",
            ]
            sources = tuple(study.run_path(output.resolve(), a, seed) for a in study.sources(arm))
            jobs.append(Job(arm, seed, path, words, sources))
    return jobs


def run(jobs: Sequence[Job], workers: int, say: Callable[[str], None] = print) -> int:
    """Trains the jobs that are not done, ``workers`` at a time; returns how many failed."""
    waiting = [job for job in jobs if job.state() != "done"]
    say(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done already, {len(waiting)} to go")
    children: set[subprocess.Popen] = set()
    start, failed = time.monotonic(), 0
    with ThreadPoolExecutor(workers) as pool:
        futures = {
            pool.submit(_train, job, _environment(workers), children): job for job in waiting
        }
        try:
            for count, future in enumerate(as_completed(futures), 1):
                job, (outcome, seconds) = futures[future], future.result()
                failed += outcome.startswith("FAILED")
                left = len(waiting) - count
                minutes = (time.monotonic() - start) / count * left / 60
                say(
                    f"[{count}/{len(waiting)}] {job.arm} seed {job.seed}: {outcome} "
                    f"({seconds:.0f} s); {left} left, about {minutes:.0f} min"
                )
        except BaseException:  # Ctrl-C or SIGTERM: the runs save, and go on next time
            pool.shutdown(wait=False, cancel_futures=True)
            for child in tuple(children):
                child.terminate()
            raise
    return failed


def _train(
    job: Job, environment: dict[str, str], children: set[subprocess.Popen]
) -> tuple[str, float]:
    """What came of it, in words, and the seconds it took. Waits for the runs it builds on."""
    for source in job.sources:
        while (state := read_json(source / "status.json").get("state")) != "done":
            if state in ("failed", "preempted"):
                return f"FAILED, the run that it builds on {state}: {source}", 0.0
            time.sleep(1)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with job.log.open("a") as log:
        child = subprocess.Popen(
            job.command(), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        children.add(child)
        code = child.wait()
        children.discard(child)
    if code == 0 and job.state() == "done":
        found = read_json(job.path / "summary.json")["val"]
        shown = {"accuracy": "accuracy", "bits_per_byte": "bits per byte"}
        outcome = ", ".join(f"{found[k]:.3f} {text}" for k, text in shown.items() if k in found)
    else:
        outcome = f"FAILED, {error_of(job.path)}"
    return outcome, time.monotonic() - start


def _environment(workers: int) -> dict[str, str]:
    """Shares the cores among the processes."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    shared = {"OMP_NUM_THREADS": str(threads)}
    if workers > 1:
        shared["OMP_WAIT_POLICY"] = "PASSIVE"
    return {**os.environ, **shared}
