"""A comparison as text for a terminal, Markdown, CSV, JSON and an HTML table."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from routerlab.comparison.groups import listed, text
from routerlab.comparison.table import Comparison, Row
from routerlab.core.identity import within
from routerlab.reports.tables import NOTHING, amount

_FILES_ONLY = ("best", "total", "FLOPs/token", "tokens", "steps")  # no room in a terminal
_WITHOUT = ("tokens/s", "active")  # of a narrow one, in this order
_MOST_KEYS = 12  # of the config, in a terminal
_LABEL_WIDTH, _NAME_WIDTH, _MARKS_WIDTH, _REST_WIDTH = 22, 15, 7, 80  # characters


def print_text(comparison: Comparison, console: Console) -> None:
    """Prints the table, as far as it fits, what varies, warnings and notes."""
    columns = {k: v for k, v in _columns(comparison).items() if k not in _FILES_ONLY}
    room = max(_LABEL_WIDTH, console.width - _REST_WIDTH)
    table = _table(comparison, columns, room)
    unlimited = console.options.update(max_width=10_000)
    for name in _WITHOUT:
        if console.measure(table, options=unlimited).minimum > console.width:
            del columns[name]
            table = _table(comparison, columns, room)
    console.print(table)
    console.print(Text(legend(comparison), "dim"))
    differing = [f"  {key}: {values}" for key, values in _diff(comparison)]
    if differing:
        console.print(Text("\nWhat differs:"))
        for line in differing[:_MOST_KEYS]:
            console.print(Text(line), no_wrap=True, overflow="ellipsis")
        if len(differing) > _MOST_KEYS:
            rest = len(differing) - _MOST_KEYS
            console.print(Text(f"  ... and {rest} more keys; --out FILE.md lists all"))
    if comparison.warnings or comparison.notes:
        console.print()
    for line in comparison.warnings:
        console.print(Text.assemble(("warning: ", "yellow"), line))
    for line in comparison.notes:
        console.print(Text(f"note: {line}"))


def _table(
    comparison: Comparison, columns: dict[str, Callable[[Row], str]], label_width: int
) -> Table:
    """Labels and marks are wrapped, and numbers are not."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for place, (name, cell) in enumerate(columns.items()):
        longest = max(len(cell(row)) for row in comparison.rows)
        if place == 0:
            table.add_column(name, width=min(longest, label_width), overflow="fold")
        elif name == "marks":
            table.add_column(name, min_width=_MARKS_WIDTH, overflow="fold")
        else:
            parts = [f"{part}/" for part in name.split("/")] if len(name) > _NAME_WIDTH else [name]
            head = "\n".join(parts).removesuffix("/")
            width = max(longest, *map(len, parts))
            table.add_column(head, justify="right", width=width, no_wrap=True)
    for row in comparison.rows:
        cells = (Text(cell(row)) for cell in columns.values())
        table.add_row(*cells, style="bold" if row["is_best"] else "")
    return table


def to_markdown(comparison: Comparison, command: str) -> str:
    """Command, table, warnings, notes and what differs between the configs."""
    columns = _columns(comparison)
    rows = [[cell(row) for cell in columns.values()] for row in comparison.rows]
    for shown, row in zip(rows, comparison.rows, strict=True):
        shown[0] = f"**{shown[0]}**" if row["is_best"] else shown[0]
    parts = [
        f"# {comparison.metric} by {', '.join(comparison.by)}",
        f"```bash\n{command}\n```",
        _markdown_table(list(columns), rows),
        legend(comparison),
    ]
    for title, lines in (("Warnings", comparison.warnings), ("Notes", comparison.notes)):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
    if comparison.varying:
        parts += ["## What differs", _markdown_table(["key", "values"], _diff(comparison))]
    return "\n\n".join(parts) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line a group, every number in full."""
    out = io.StringIO()
    names = [name for name in comparison.rows[0] if name != "values"]
    writer = csv.DictWriter(out, names, lineterminator="\n", extrasaction="ignore", restval="")
    writer.writeheader()
    for row in comparison.rows:
        left_out = " ".join(f"{count} {state}" for state, count in row["unfinished"].items())
        writer.writerow({**row, "unfinished": left_out, "marks": ", ".join(row["marks"])})
    return out.getvalue()


def to_json(comparison: Comparison, command: str) -> str:
    """Everything, with the run and the value of every seed."""
    groups = {
        group.label: [
            {"run": run.name, "path": run.path, "seed": run.seed, "value": row["values"][run.seed]}
            for run in group.runs
        ]
        for group, row in zip(comparison.groups, comparison.rows, strict=True)
    }
    names = ("metric", "better", "by", "baseline", "rows", "varying", "warnings", "notes")
    found = {name: getattr(comparison, name) for name in names}
    return json.dumps({"command": command} | found | {"groups": groups}, indent=2, default=str)


def html_table(comparison: Comparison) -> str:
    """The table and its legend; the best row has the class ``own``, marks ``warn``."""
    columns = _columns(comparison)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = ""
    for row in comparison.rows:
        cells = [escape(cell(row)) for cell in columns.values()]
        last = f'<td class="warn">{cells[-1]}</td>' if row["marks"] else f"<td>{cells[-1]}</td>"
        middle = "".join(f"<td>{cell}</td>" for cell in cells[1:-1])
        own = ' class="own"' if row["is_best"] else ""
        body += f"<tr{own}><th>{cells[0]}</th>{middle}{last}</tr>"
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>{escape(legend(comparison))}</p>"
    )


WRITERS: dict[str, Callable[[Comparison, str], str]] = {
    ".md": to_markdown,
    ".csv": lambda comparison, _: to_csv(comparison),
    ".json": to_json,
}


def write(comparison: Comparison, path: Path, command: str) -> None:
    """Writes the comparison in the format that the suffix names; ``.html`` is a page of figures."""
    if path.suffix == ".html":
        from routerlab.comparison.page import write_page

        write_page(comparison, path, command)
        return
    path.write_text(WRITERS[path.suffix](comparison, command), encoding="utf-8")


def legend(comparison: Comparison) -> str:
    """What the columns of the table mean."""
    better = f", {comparison.better} is better, * the best" if comparison.better else ""
    words = [f"{comparison.metric}: mean ± half the 95% t-interval over seeds{better}."]
    if comparison.baseline is not None:
        words.append(f"Differences to {comparison.baseline} are taken seed by seed.")
    if tests := sum(row["p"] is not None for row in comparison.rows):
        corrected = f", Holm-corrected for {tests} tests" if tests > 1 else ""
        words.append(f"p: paired t-test, two-sided{corrected}.")
    if any(row["marks"] for row in comparison.rows):
        words.append("Marks: see the warnings and notes.")
    return " ".join(words)


def _columns(comparison: Comparison) -> dict[str, Callable[[Row], str]]:
    """Names of the columns, and what they say of a row; the label first, the marks last."""

    def label(row: Row) -> str:
        return row["label"] + " *" * row["is_best"]

    def best(row: Row) -> str:
        return NOTHING if row["best"] is None else f"{_number(row['best'])} ({row['best_run']})"

    def seeds(row: Row) -> str:
        return " ".join([str(row["seeds"]), *(f"+{n} {s}" for s, n in row["unfinished"].items())])

    def difference(row: Row) -> str:
        if row["label"] == comparison.baseline:
            return "baseline"
        return _with_half(row["difference"], row["difference_half"], sign=True)

    found: dict[str, Callable[[Row], str]] = {
        ", ".join(comparison.by): label,
        comparison.metric.removeprefix("val/"): lambda row: _with_half(row["mean"], row["half"]),
        "seeds": seeds,
        "best": best,
    }
    if comparison.baseline is not None:
        found |= {"difference": difference, "p": lambda row: _p(row["p_holm"])}
    return found | {
        "active": lambda row: amount(row["active_parameters"]),
        "total": lambda row: amount(row["total_parameters"]),
        "FLOPs/token": lambda row: amount(row["flops_per_token"]),
        "tokens/s": lambda row: amount(row["tokens_per_second"]),
        "tokens": lambda row: amount(row["tokens"]),
        "steps": lambda row: amount(row["steps"]),
        "marks": lambda row: ", ".join(row["marks"]),
    }


def _with_half(mean: float | None, half: float | None, sign: bool = False) -> str:
    """A mean and half its interval; a dash for what is not known."""
    if mean is None:
        return NOTHING
    return f"{_number(mean, sign)} ± {NOTHING if half is None else _number(half)}"


def _number(value: float, sign: bool = False) -> str:
    plus = "+" if sign else ""
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:{plus}.3g}"
    return f"{value:{plus}.4f}" if abs(value) < 100 else f"{value:{plus}.1f}"


def _p(value: float | None) -> str:
    if value is None:
        return NOTHING
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _diff(comparison: Comparison) -> list[list[str]]:
    """Each key that differs with its values and their groups: ``15 (a, b); else 16``. Keys below
    those that groups are made by, and names of classes, come last.
    """
    found = []
    for key, by_label in comparison.varying.items():
        groups: dict[str, list[str]] = {}
        for label, value in by_label.items():
            groups.setdefault(text(value), []).append(label)
        if len(groups) == len(by_label) and key in comparison.by:
            continue  # the labels say it
        usual = max(groups, key=lambda value: len(groups[value]))
        others = [f"{v} ({listed(labels)})" for v, labels in groups.items() if v != usual]
        found.append([key, "; ".join([*others, f"else {usual}"])])
    by = tuple(comparison.by)
    return sorted(found, key=lambda pair: (pair[0].endswith("_target_"), within(pair[0], by)))


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
