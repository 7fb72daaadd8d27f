"""What a conversion did with every tensor, and how far the two models are apart."""

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from routerlab.convert.compare import TOLERANCE, Comparison

FILE = "certificate.json"


@dataclass(frozen=True)
class Move:
    """Source tensors that became target tensors, and how. No sources: they are made up; no targets:
    they hold nothing (zeros).
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    how: str


class ConversionFailed(Exception):
    """A conversion whose certificate says so; nothing was left of the target."""

    def __init__(self, certificate: "Certificate") -> None:
        super().__init__("; ".join(certificate.failures))
        self.certificate = certificate


@dataclass
class Certificate:
    """Filled in as a conversion goes on, and checked after each part.

    Args:
        command: ``import``, ``export`` or ``upcycle``.
        source, target: the two directories (or names).
        family: the class of transformers on the other side.
        moves: every tensor's way.
        source_keys, target_keys: the tensors that there are on either side.
        faults: tensors of another shape than the model wants, or with numbers for which it has no
            place, in words.
        loading: what transformers said when it read the target: lists that must be empty.
        comparison: of the two models; None until it is made.
        notes: what else is to be known.
    """

    command: str
    source: str
    target: str
    family: str
    moves: list[Move] = field(default_factory=list)
    source_keys: Collection[str] = ()
    target_keys: Collection[str] = ()
    faults: list[str] = field(default_factory=list)
    loading: dict[str, list[str]] = field(default_factory=dict)
    comparison: Comparison | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """Why the conversion is not faithful; empty for one that is."""
        found = _uses("source", "used", self.source_keys, (m.sources for m in self.moves))
        found += _uses("target", "written", self.target_keys, (m.targets for m in self.moves))
        found += self.faults
        found += [f"{what}: {_some(keys)}" for what, keys in self.loading.items() if keys]
        return found if self.comparison is None else found + self.comparison.failures

    def check(self) -> None:
        """Raises `ConversionFailed` if anything is wrong so far."""
        if self.failures:
            raise ConversionFailed(self)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = asdict(self)
        sizes = {"source_keys": len(self.source_keys), "target_keys": len(self.target_keys)}
        return plain | sizes | {"tolerance": TOLERANCE, "failures": self.failures}

    def write(self, folder: Path) -> None:
        """``certificate.json`` in a folder."""
        (folder / FILE).write_text(json.dumps(self.as_json(), indent=2) + "\n")

    def show(self, console: Console) -> None:
        """Prints it."""
        failures = self.failures
        verdict = "FAILED" if failures else "certified"
        console.print(f"{self.command} ({self.family}): {verdict}", style="bold", highlight=False)
        console.print(f"{self.source} -> {self.target}", soft_wrap=True, highlight=False)
        console.print(self._tensors())
        if self.comparison is not None:
            console.print(self._differences(self.comparison))
        for text in self.notes:
            console.print(f"note: {text}", soft_wrap=True, highlight=False, markup=False)
        for text in failures:
            line = f"FAILED: {text}"
            console.print(line, style="red", soft_wrap=True, highlight=False, markup=False)

    def _tensors(self) -> Table:
        table = Table("how", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("source tensors", justify="right")
        table.add_column("target tensors", justify="right")
        ways: dict[str, list[int]] = {}
        for move in self.moves:
            count = ways.setdefault(move.how, [0, 0])
            count[0] += len(move.sources)
            count[1] += len(move.targets)
        for how, counts in ways.items():
            table.add_row(how, *map(str, counts))
        table.add_section()
        table.add_row("in all", str(len(self.source_keys)), str(len(self.target_keys)))
        return table

    def _differences(self, comparison: Comparison) -> Table:
        table = Table("", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        columns = ["largest value", "largest difference", "of a token's largest"]
        for column in columns + ["same experts"] * bool(comparison.agreement):
            table.add_column(column, justify="right")
        seen = {f"layer {i}": found for i, found in enumerate(comparison.hidden)}
        for i, (name, found) in enumerate((seen | {"logits": comparison.logits}).items()):
            share = comparison.agreement.get(i)
            same = [] if share is None else [f"{share:.1%}"]
            figures = (f"{found.size:.3g}", f"{found.largest:.1e}", f"{found.relative:.1e}")
            table.add_row(name, *figures, *same)
        return table


def _uses(
    side: str, done: str, present: Collection[str], named: Iterable[Iterable[str]]
) -> list[str]:
    """What is wrong with the tensors of one side: each must be named exactly once."""
    times, there = Counter(key for keys in named for key in keys), set(present)
    wrong = {
        f"{side} tensors not {done}": there - times.keys(),
        f"{side} tensors missing": times.keys() - there,
        f"{side} tensors {done} more than once": {key for key, count in times.items() if count > 1},
    }
    return [f"{what}: {_some(sorted(keys))}" for what, keys in wrong.items() if keys]


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
