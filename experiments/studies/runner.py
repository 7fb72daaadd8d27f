"""The runs of a study as jobs of a sweep, each in a process of its own."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from routerlab.sweeps import runner
from routerlab.sweeps.jobs import Job
from routerlab.sweeps.local import Local, visible_gpus
from routerlab.sweeps.search import Listed

from .definition import Study


def plan(study: Study, seeds: Sequence[int], output: Path) -> list[Job]:
    """All runs, one seed after the other: arms with results can be compared early. Arms that build
    on others come after them.
    """
    jobs = []
    for seed in seeds:
        for arm in sorted(study.arms, key=lambda arm: bool(study.sources(arm))):
            path = study.run_path(output.resolve(), arm, seed)
            words = [*study.words(arm, output.resolve(), seed), f"seed={seed}", "logger=[]"]
            sources = tuple(study.run_path(output.resolve(), a, seed) for a in study.sources(arm))
            jobs.append(Job(f"{arm} seed {seed}", path, tuple(words), sources))
    return jobs


def run(study: Study, jobs: Sequence[Job], output: Path, workers: int) -> int:
    """Trains the jobs that are not done, ``workers`` at a time; returns the exit code of a sweep.

    Raises ``ValueError`` if a directory holds a run of other overrides.
    """
    for job in jobs:
        _check_words(job)
    folder = output.resolve() / study.name
    then = f"python experiments/study.py report {study.name}"
    return runner.run(Listed(jobs), Local(folder, workers, visible_gpus()), folder, then)


def _check_words(job: Job) -> None:
    path = job.path / "overrides.yaml"
    if not path.is_file():
        return
    found = [w for w in yaml.safe_load(path.read_text()) if not w.startswith("run_dir=")]
    if found != list(job.words):
        raise ValueError(
            f"{job.path} holds a run of other overrides:\n  it has  {' '.join(found)}\n"
            f"  but now {' '.join(job.words)}\nremove it, or choose another --output"
        )
