"""``routerlab train -m``: many runs from one line."""

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from routerlab.core.config import ConfigError
from routerlab.sweeps.definition import Sweep, read
from routerlab.sweeps.display import duration
from routerlab.sweeps.estimate import estimate
from routerlab.sweeps.jobs import Job
from routerlab.sweeps.local import Local, from_config
from routerlab.sweeps.runner import run

if TYPE_CHECKING:
    from routerlab.sweeps.slurm import Slurm

_STATES = {
    "done": "done", "running": "running", "cut": "to go on with", "failed": "to try again",
    "new": "new",
}  # fmt: skip

_EXAMPLES = """\
words:
  KEY=a,b                   all of them, crossed with the others; seed=0,1,2
  KEY='glob(*)'             every name, or glob(s*), glob(*,exclude=s*); range(0,8,2)
  sweep=NAME                what configs/sweep/NAME.yaml varies
  group=NAME                the folder under outputs/sweeps, and W&B's group
  launcher=slurm            a job array of SLURM, with resources=cpu, gpu, node or multi_node
  launcher.workers=N        runs at a time on this machine
with --trials N also:
  KEY='interval(0,1)'       or tag(log,interval(1e-4,1e-2)), choice(a,b), range(1,9)

The same command goes on: what is done is left alone, what was cut off is resumed, what failed is
tried again. Exit codes: 0 all done, 1 some failed, 2 wrong words, 130 or 143 interrupted.
"""


def main(words: Sequence[str]) -> int:
    """Trains the jobs of a sweep, or shows them (``--dry-run``); returns the exit code."""
    arguments = _parser().parse_intermixed_args(list(words))
    sweep = read(arguments.words, arguments.trials, arguments.search, arguments.metric)
    launcher = _launcher(sweep)
    for note in sweep.notes:
        print(note)
    if arguments.dry_run:
        _show(sweep, launcher)
        return 0
    return run(sweep.source, launcher, sweep.folder, f"routerlab compare {sweep.folder}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().rstrip()}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="routerlab train -m",
        description="Trains many runs: what the words vary, on this machine or on SLURM.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for one run, or below")
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep, whatever the words")
    parser.add_argument("--dry-run", action="store_true", help="show the jobs and their cost")
    parser.add_argument("--trials", type=int, metavar="N", help="search with N points")
    parser.add_argument("--search", choices=("random", "tpe"), default="random")
    parser.add_argument("--metric", metavar="KEY", help="what tpe makes small or large")
    parser.add_argument("-cd", "--config-dir", metavar="DIR", help="a folder of your own configs")
    return parser


def _launcher(sweep: Sweep) -> "Local | Slurm":
    if "workers" in sweep.cfg.launcher:
        return from_config(sweep.cfg, sweep.folder, sweep.source.total)
    from routerlab.sweeps.slurm import Slurm

    return Slurm(sweep.folder, sweep.cfg)


def _show(sweep: Sweep, launcher: "Local | Slurm") -> None:
    """Prints the jobs, what is left to do, and what that costs."""
    jobs, console = sweep.source.preview(), Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    states = {job.path: job.state() for job in jobs}
    width = max((len(job.title) for job in jobs), default=0)
    for job in jobs:
        say(f"{job.title:<{width}}  {states[job.path]:<7}  {job.path.name}")
    say(f"in {sweep.folder}")
    counts = Counter(states.values())
    later = sweep.source.total - len(jobs)
    parts = [f"{counts[state]} {word}" for state, word in _STATES.items() if counts[state]]
    parts += [f"{later} that the search will choose"] if later > 0 else []
    say(f"{sweep.source.total} jobs: {', '.join(parts)}")
    left = [job for job in jobs if states[job.path] not in ("done", "running")]
    if left:
        for line in _cost(sweep, left, later, launcher):
            say(line)
    if left and not isinstance(launcher, Local):
        say(f"\n{launcher.script(left)}")


def _cost(sweep: Sweep, left: Sequence[Job], later: int, launcher: "Local | Slurm") -> list[str]:
    """Tokens and time of the jobs that are not done, the later ones taken to be like the others."""
    here = isinstance(launcher, Local)
    found = estimate(left, sweep.folder, launcher.threads if here else None)
    share = (len(left) + later) / len(left)
    lines = []
    if found.tokens is not None:
        lines.append(f"training on {share * found.tokens:,.0f} tokens")
    if found.seconds is None:
        return [*lines, f"how long that takes is not known: {found.source}"]
    count = round(share * len(left))
    workers = launcher.workers if here else sweep.cfg.launcher.at_once or count
    at_once = min(workers, count)
    whole = max(share * found.seconds / at_once, found.seconds / len(left))
    lines.append(
        f"about {duration(whole)}: {count} jobs of about {duration(found.seconds / len(left))}, "
        f"{at_once} at a time (from {found.source})"
    )
    return lines
