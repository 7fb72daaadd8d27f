"""The command line of the studies."""

import argparse
import csv
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import runner
from .definition import Study, load, names

_ABOUT = {
    "check": "every arm takes one training step",
    "run": "train what is not done yet; go on with what was interrupted",
    "time": "the cost of each arm's training step, into step_time.csv",
    "report": "results.csv, table.md and figure.png, in the study's folder",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 (an arm failed), 2 (a wrong study or value), 130 (interrupted)."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments.jobs < 1:
            raise ValueError(f"--jobs={arguments.jobs}: must be at least 1")
        if arguments.seconds <= 0:
            raise ValueError(f"--seconds={arguments.seconds}: must be above 0")
        return max(
            _COMMANDS[arguments.command](load(study), arguments) for study in arguments.study
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def _run(study: Study, arguments: argparse.Namespace) -> int:
    print(f"{study.name}: {study.question}")
    jobs = runner.plan(study, arguments.seeds or [0, 1, 2], arguments.output)
    code = runner.run(study, jobs, arguments.output, arguments.jobs)
    if code > 2:  # Ctrl-C or SIGTERM: the runs have saved
        raise KeyboardInterrupt
    return code


def _check(study: Study, arguments: argparse.Namespace) -> int:
    from .timing import check

    wrong = check(study, [])
    for arm in study.arms:
        print(f"{study.name} {arm}: {wrong.get(arm, 'ok')}")
    return int(bool(wrong))


def _time(study: Study, arguments: argparse.Namespace) -> int:
    from .timing import measure

    found, lines = measure(study, arguments.output.resolve(), arguments.seconds)
    with (study.folder / "step_time.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    for line in lines:
        print("  ".join(f"{cell:<14}" for cell in line))
    return int(len(found) + 1 < sum(not study.sources(arm) for arm in study.arms))


def _report(study: Study, arguments: argparse.Namespace) -> int:
    from .figure import draw
    from .results import collect, write_csv
    from .table import table
    from .timing import read_times

    output = arguments.output.resolve()
    rows = collect(study, arguments.seeds, output)
    page = table(study, rows, read_times(study.folder / "step_time.csv"))
    write_csv(study.folder / "results.csv", rows)
    (study.folder / "table.md").write_text(page)
    draw(study, rows, output, study.folder / "figure.png")
    print(page)
    return int(any(row["state"] != "done" for row in rows))


_COMMANDS = {"check": _check, "run": _run, "time": _time, "report": _report}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python experiments/study.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, about in _ABOUT.items():
        sub = commands.add_parser(command, help=about, description=about)
        sub.add_argument("study", nargs="+", help=f"{', '.join(names())}, or a folder")
        sub.add_argument("--seeds", type=_numbers, help="run: 0,1,2; report: all that were run")
        sub.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
        sub.add_argument("--output", type=Path, default=Path("outputs/studies"))
        sub.add_argument("--seconds", type=float, default=4.0, help="time: for each arm")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
