"""Rows as a table and as JSON, with the machine that they come from."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from routerlab.bench.layer import Row, Settings
from routerlab.bench.routers import RoutersFound
from routerlab.bench.step import LOG_EVERY, StepShare

COLUMNS = ("", "x\ndense", "quartiles", "x\nHF", "ms", "peak\nMiB", "x\ndense", "saved\nMiB")

ROUTER_COLUMNS = ("", "%", "quartiles", "ms", "x token\nchoice", "picks", "goal", "met")


def table(rows: Sequence[Row]) -> Table:
    """The figures of all rows, under a line for each shape and dtype, within 80 columns; a row
    without figures says why below.
    """
    found = Table(
        title="forward + backward of one layer; shapes are T,D,F,E,K",
        caption=_caption(rows),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(COLUMNS):
        found.add_column(column, justify="right" if index else "left", no_wrap=True)
    last = None
    for row in rows:
        if (row.shape, row.dtype) != last:
            last = (row.shape, row.dtype)
            found.add_row(f"[bold]{row.shape} {row.dtype}[/bold]")
        if row.status != "ok":
            found.add_row(f"  {row.path}", *["-"] * 7)
            continue
        quartiles = "" if row.lower is None else f"{row.lower:.2f}-{row.upper:.2f}"
        numbers = (row.milliseconds, row.peak_mib, row.peak_to_dense, row.saved_mib)
        found.add_row(
            f"  {row.path}",
            number(row.ratio),
            quartiles,
            number(row.to_transformers),
            *map(number, numbers),
        )
    return found


def step_lines(share: StepShare) -> list[str]:
    """What losses and diagnostics cost, in sentences."""
    losses, both = share.losses, share.losses_and_diagnostics
    every = share.losses_percent + share.diagnostics_percent
    return [
        f"training step: {share.milliseconds:.0f} ms without losses and diagnostics",
        f"  losses: {share.losses_percent:+.1f} % "
        f"(quartiles {100 * (losses.lower - 1):+.1f} to {100 * (losses.upper - 1):+.1f} %)",
        f"  losses and diagnostics on every step: {every:+.1f} % "
        f"(quartiles {100 * (both.lower - 1):+.1f} to {100 * (both.upper - 1):+.1f} %)",
        f"  losses, and diagnostics at log_every={LOG_EVERY}: {share.promised_percent:+.1f} %",
    ]


def routers_table(found: RoutersFound) -> Table:
    """A row a router, within 80 columns; a router without figures says why below."""
    table = Table(
        title=f"forward + backward of routers with their losses, shape {found.shape},\n"
        f"as a share of the MoE layer's {found.layer_milliseconds:.1f} ms",
        caption=_routers_caption(found),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(ROUTER_COLUMNS):
        side = "right" if index else "left"
        table.add_column(column, justify=side, no_wrap=bool(index), overflow="fold")
    for row in found.rows:
        name = row.name + ("*" if row.share_of == "step" else "")
        quartiles = "" if row.lower is None else f"{number(row.lower)}-{number(row.upper)}"
        numbers = (row.milliseconds, row.to_token_choice, row.assignments_per_token)
        goal = "" if row.goal is None else f"{row.goal:g}"
        met = {True: "yes", False: "no", None: ""}[row.met]
        table.add_row(name, number(row.percent), quartiles, *map(number, numbers), goal, met)
    return table


def routers_json(found: RoutersFound, settings: Settings) -> dict[str, Any]:
    """Everything that was measured, and where."""
    return {"environment": environment(settings)} | asdict(found)


def as_json(rows: Sequence[Row], share: StepShare | None, settings: Settings) -> dict[str, Any]:
    """Everything that was measured, and where."""
    step = None
    if share is not None:
        step = asdict(share) | {"log_every": LOG_EVERY, "percent": share.promised_percent}
    return {
        "environment": environment(settings),
        "rows": [asdict(row) for row in rows],
        "step": step,
    }


def environment(settings: Settings) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cuda = settings.device.type == "cuda"
    return {
        "cpu": cpu_model(),
        "gpu": torch.cuda.get_device_name(settings.device) if cuda else None,
        "threads": torch.get_num_threads(),
        "clock": settings.clock.__name__,
        "seconds": settings.seconds,
        "seed": settings.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def cpu_model() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _caption(rows: Sequence[Row]) -> str | None:
    notes = [f"{r.shape} {r.dtype} {r.path}: {r.status}" for r in rows if r.status != "ok"]
    return "\n".join(notes + dropped(rows)) or None


def _routers_caption(found: RoutersFound) -> str | None:
    notes = [f"{row.name}: {row.status}" for row in found.rows if row.status != "ok"]
    if found.step_milliseconds is not None:
        notes.append(f"* of a training step, {found.step_milliseconds:.0f} ms")
    return "\n".join(notes + dropped(found.rows)) or None


def dropped(rows: Sequence[Any]) -> list[str]:
    """A line on the samples of rows that another process spoilt, or none."""
    used = sum(row.samples or 0 for row in rows)
    busy = sum(row.busy or 0 for row in rows)
    if not busy:
        return []
    return [f"{busy} of {busy + used} samples dropped: another process was in the way"]


def number(value: float | None) -> str:
    """Two digits after the point below 10, else one; nothing for None."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"
