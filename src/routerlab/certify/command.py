"""``routerlab certify``: a router's promises, checked by running it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from routerlab.core.config import ConfigError, available, nearest, use_directory


def main(argv: Sequence[str]) -> int:
    """Certifies the router that ``argv`` composes, or all of them. Exit codes: 0, 1 (a check
    failed), 2 (bad options); `ConfigError` and `ValueError` for a wrong name or value.
    """
    try:
        arguments = _parser().parse_args(list(argv))
    except SystemExit as stop:  # argparse has printed why, or the help
        return int(stop.code or 0)
    for directory in arguments.config_dir:
        use_directory(directory)
    _check(arguments)
    return _certify(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="routerlab certify",
        description="Runs a router's contract checks; exit code 1 if one fails.",
    )
    add = parser.add_argument
    add("words", nargs="+", metavar="WORD", help="router=NAME (or all), router.KNOB=VALUE, ...")
    add("--config-dir", "-cd", action="append", default=[], metavar="DIR", help="your own configs")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add("--write", type=Path, metavar="FILE", help="with router=all: write the page of all routers")
    add("--seconds", type=float, default=1.0, help="of timing a router for --write (default 1)")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Refuses words that say nothing of the router, and files that cannot be written."""
    groups = ("router", "balancer")
    for word in arguments.words:
        key = word.partition("=")[0]
        if "=" not in word or key.split(".")[0] not in groups:
            hint = nearest(key, groups)
            raise ConfigError(f"{word!r}: certify takes router=NAME and router.KNOB=VALUE; {hint}")
    if _name(arguments.words) == "all":
        if len(arguments.words) > 1:
            raise ConfigError("router=all: takes every router as its config says, without knobs")
    elif arguments.write is not None:
        raise ConfigError("--write: the page lists all routers; say router=all")
    for option in ("json", "write"):
        path = getattr(arguments, option)
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"--{option}={path}: its folder does not exist")
    if arguments.seconds <= 0:
        raise ConfigError(f"--seconds={arguments.seconds}: must be above 0")


def _name(words: Sequence[str]) -> str:
    """The router that the words choose."""
    names = [word.partition("=")[2] for word in words if word.startswith("router=")]
    if not names:
        raise ConfigError("which router? say router=NAME, or router=all")
    return names[-1]


def _certify(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from routerlab.certify import certificate as certificates
    from routerlab.certify import page
    from routerlab.certify.subject import Subject

    everything = _name(arguments.words) == "all"
    if everything:
        subjects = [Subject.of(name) for name in available("router")]
    else:
        subjects = [Subject.of(_name(arguments.words), arguments.words)]
        subjects[0].router()  # a refused value is bad input, not a broken promise
    console, found = Console(highlight=False), []
    for subject in subjects:
        found.append(certificates.certify(subject))
        if not everything or found[-1].failed:
            console.print(certificates.card(found[-1]))
        else:
            console.print(f"{subject.name}: [green]pass[/green]")
    if arguments.json is not None:
        plain = [certificate.as_json() for certificate in found]
        arguments.json.write_text(json.dumps(plain, indent=2) + "\n")
    if arguments.write is not None:
        entries = page.measure(subjects, found, arguments.seconds)
        arguments.write.write_text(page.write_page(entries))
    return int(any(certificate.failed for certificate in found))
