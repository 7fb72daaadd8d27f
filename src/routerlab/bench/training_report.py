"""What whole training costs, as a table, sentences and JSON."""

from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from routerlab.bench.layer import Settings
from routerlab.bench.report import dropped, environment, number, step_lines
from routerlab.bench.training import TrainingFound
from routerlab.bench.training_loops import OURS

_COLUMNS = ("", "x bare", "quartiles", "tokens/s", "ms a step", "goal", "met")


def training_table(found: TrainingFound) -> Table:
    """A row a contestant, and below it what else was measured."""
    table = Table(
        title=f"training, {found.size}",
        caption="\n".join(dropped(found.rows)) or None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in found.rows:
        quartiles = "" if row.lower is None else f"{number(row.lower)}-{number(row.upper)}"
        speed, milliseconds = f"{row.tokens_per_second:,.0f}", f"{row.milliseconds:.1f}"
        goal = "" if row.goal is None else f"{row.goal:g}"
        met = {True: "yes", False: "no", None: ""}[row.met]
        table.add_row(row.name, f"{row.ratio:.3f}", quartiles, speed, milliseconds, goal, met)
    return table


def training_lines(found: TrainingFound) -> list[str]:
    """What the table does not hold, in sentences."""
    met = {True: "met", False: "not met"}
    lines = [
        f"{OURS} takes {found.to_transformers:.3f} times as long as transformers "
        f"(goal: below 1, {met[found.met['transformers']]})",
        *step_lines(found.share),
        f"  goal: {found.share_goal:g} %, {met[found.met['losses and diagnostics']]}",
    ]
    if (start := found.start_up) is not None:
        lines += [
            f"start-up: {start.seconds:.1f} s to the first step ({start.least:.1f} to "
            f"{start.most:.1f} in {start.processes} processes; goal {start.goal:g}, "
            f"{met[start.met]})",
            f"  data, model and checks: {start.before_run:.1f} s (imports alone: "
            f"{start.imports:.1f}); run directory, loggers, trainer: {start.run_and_loggers:.1f}; "
            f"first step: {start.first_step:.1f}",
        ]
    return lines


def training_json(found: TrainingFound, settings: Settings) -> dict[str, Any]:
    """Everything that was measured, and where."""
    percent = {"percent": found.share.promised_percent, "share_goal": found.share_goal}
    return {"environment": environment(settings)} | asdict(found) | percent | {"met": found.met}
