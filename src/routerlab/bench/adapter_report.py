"""What adapters cost, as a table and as JSON."""

from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from routerlab.bench.adapters import AdaptersFound
from routerlab.bench.layer import Settings
from routerlab.bench.report import dropped, environment, number

COLUMNS = ("", "x", "quartiles", "ms", "rank", "peak\nMiB", "x\npeak", "saved\nMiB", "goal", "met")
PARTS = {
    "method": "training step, x plain LoRA of the rank that is activated",
    "samples": "ReMix's training step, x soft mixture (no loss)",
    "evaluation": "evaluation, x soft mixture",
}


def adapters_table(found: AdaptersFound) -> Table:
    """A row a contestant, under a line for each part, within 80 columns; one without figures says
    why below.
    """
    table = Table(
        title=found.sizes, caption=_caption(found), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    part = None
    for row in found.rows:
        if row.part != part:
            part = row.part
            table.add_section()
            table.add_row(f"[bold]{row.part}[/bold]")
        quartiles = "" if row.lower is None else f"{number(row.lower)}-{number(row.upper)}"
        memory = map(number, (row.peak_mib, row.peak_ratio, row.saved_mib))
        rank = "" if row.lora_rank is None else str(row.lora_rank)
        goal = "" if row.goal is None else f"{row.goal:.3g}"
        met = {True: "yes", False: "no", None: ""}[row.met]
        milliseconds = "" if row.milliseconds is None else f"{row.milliseconds:.0f}"
        cells = (number(row.ratio), quartiles, milliseconds, rank, *memory, goal, met)
        table.add_row(f"  {row.name}", *cells)
    return table


def adapters_json(found: AdaptersFound, settings: Settings) -> dict[str, Any]:
    """Everything that was measured, and where."""
    return {"environment": environment(settings)} | asdict(found)


def _caption(found: AdaptersFound) -> str | None:
    parts = dict.fromkeys(row.part for row in found.rows)
    notes = [f"{part}: {PARTS[part]}" for part in parts]
    notes += [f"{row.name}: {row.status}" for row in found.rows if row.status != "ok"]
    return "\n".join(notes + dropped(found.rows)) or None
