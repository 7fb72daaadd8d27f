"""``routerlab compare``: runs side by side."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from routerlab.core.config import ConfigError, nearest

_ABOUT = """\
Finished runs in groups, their seeds averaged: means with intervals, paired differences to a
baseline, costs, what differs in the configs, and marks where the comparison is not fair.
"""


def main(argv: Sequence[str]) -> int:
    """Prints a comparison of runs, and writes it to files."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    from rich.console import Console

    from routerlab.comparison.formats import WRITERS, print_text, write
    from routerlab.comparison.runs import load_runs
    from routerlab.comparison.table import compare_groups

    runs, skipped = load_runs(arguments.path)
    if arguments.wandb:
        from routerlab.comparison.wandb_runs import load_wandb

        found, more = load_wandb(arguments.wandb, arguments.group)
        runs, skipped = runs + found, skipped + more
    try:
        comparison = compare_groups(runs, arguments.by, arguments.metric, arguments.baseline)
    except ConfigError:
        _say(skipped)
        raise
    comparison.warnings[:0] = skipped
    command = shlex.join(["routerlab", "compare", *argv])
    if arguments.format == "text":
        console = Console()
        print_text(comparison, console if console.is_terminal else Console(width=100))
    else:
        print(WRITERS[_SUFFIX[arguments.format]](comparison, command), end="")
        if arguments.format == "csv":
            _say(comparison.warnings)
    for path in arguments.out:
        write(comparison, path, command)
        print(f"wrote {path}", file=sys.stderr)
    return 0


_SUFFIX = {"markdown": ".md", "csv": ".csv", "json": ".json"}


def _say(warnings: Sequence[str]) -> None:
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what can be known to be wrong before any run is read."""
    if not arguments.path and not arguments.wandb:
        raise ConfigError("compare: give directories of runs, or --wandb entity/project")
    if arguments.group and not arguments.wandb:
        raise ConfigError("--group: is a group of W&B; say --wandb entity/project, too")
    for path in arguments.out:
        if path.suffix not in (".html", *_SUFFIX.values()):
            near = nearest(path.suffix, [".html", *_SUFFIX.values()])
            raise ConfigError(f"--out {path}: no format for {path.suffix!r}; {near}")
        if not path.parent.is_dir():
            raise ConfigError(f"--out {path}: there is no directory {str(path.parent)!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="routerlab compare", description=_ABOUT)
    parser.add_argument(
        "path", nargs="*", type=Path, metavar="PATH", help="a run, or a folder with runs below it"
    )
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="read the runs of W&B, too")
    parser.add_argument("--group", help="of W&B: only the runs of that sweep")
    parser.add_argument(
        "--by", type=_words, default=[], metavar="KEY[,KEY]",
        help="config groups (router, adapter) or keys (router.top_k) that tell the groups apart; "
        "default router",
    )  # fmt: skip
    parser.add_argument(
        "--metric", help="default val/bits_per_byte, or val/accuracy where the runs have that"
    )
    parser.add_argument(
        "--baseline", metavar="LABEL",
        help="the group that differences are taken to; default token_choice, else the first",
    )  # fmt: skip
    parser.add_argument("--format", choices=["text", *_SUFFIX], default="text")
    parser.add_argument(
        "--out", action="append", type=Path, default=[], metavar="FILE",
        help="also write FILE.md, .csv, .json or .html (a page with curves); can be repeated",
    )  # fmt: skip
    return parser


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]
