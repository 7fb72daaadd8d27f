"""What the commands ``import``, ``export`` and ``upcycle`` have in common."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # at run time torch is imported only once the arguments can be read
    from routerlab.convert.certificate import Certificate


def parser(command: str, about: str, source: str, what: str) -> argparse.ArgumentParser:
    """A parser of one source, ``--out`` and ``--seed``."""
    made = argparse.ArgumentParser(prog=f"routerlab {command}", description=about)
    made.add_argument("source", metavar=source, help=what)
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new directory")
    about = "of the random tokens on which both models are compared (default 0)"
    made.add_argument("--seed", type=int, default=0, help=about)
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace | int:
    """The arguments, or the exit code where argparse has printed why, or the help."""
    try:
        return made.parse_intermixed_args(list(argv))
    except SystemExit as stop:
        return int(stop.code or 0)


def finish(convert: "Callable[[], Certificate]") -> int:
    """Converts and prints the certificate. Exit codes: 0, or 1 for one that failed."""
    from rich.console import Console

    from routerlab.convert.certificate import ConversionFailed
    from routerlab.training import assemble

    assemble.quiet()
    console = Console(highlight=False)
    try:
        certificate = convert()
    except ConversionFailed as error:
        error.certificate.show(console)
        return 1
    certificate.show(console)
    return 0
