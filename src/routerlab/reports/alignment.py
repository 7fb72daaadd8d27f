"""What the page of a run shows of routing alignment; nothing where no bank of neighbours was."""

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from routerlab.reports.accuracy_figures import run_color
from routerlab.reports.figures import (
    BLUE,
    bin_means,
    escape_label,
    line,
    polish,
    running_mean,
)
from routerlab.reports.run_files import RunFiles, curve, number, section
from routerlab.reports.sections import Section, figure_section
from routerlab.reports.tables import NOTHING, digits

_WEIGHT = re.compile(r"loss/([^/]+)/weight")  # what a loss that warms up logs beside its value
_COLUMNS = {
    "distance": "distance to neighbours",
    "similarity": "likeness to embeddings (CKA)",
    "load_entropy": "entropy of the mean routing",
    "accuracy": "answered rightly",
}


def alignment_sections(run: RunFiles) -> Iterator[Section]:
    """The table of the routing before and after, and the curves of the two losses."""
    rows = {n: found for n, other in run.baselines.items() if (found := _told(other.summary))}
    if own := _told(run.summary):
        rows["this run"] = own
    if rows:
        yield Section(
            "alignment",
            "Alignment",
            "Routing of the training samples",
            _table(rows),
            f"Before the first step and after the last, on {_sizes(own or [*rows.values()][0])}. "
            "The distance of a sample's routing to that of its nearest such neighbours (0: they "
            "are routed alike) falls where routing follows meaning; it also falls where all "
            "samples come to be routed alike, and then the entropy of the mean falls with it.",
        )
    curves = {name: other.metrics for name, other in run.baselines.items()}
    if figure := alignment_figure(run.metrics, curves):
        yield figure_section(
            "fig-alignment",
            "Alignment loss",
            "Task and alignment",
            figure,
            "The loss of the task, and the loss that draws routings together before its weight, "
            "which the third panel shows; other runs of this job are dashed.",
        )


def alignment_figure(metrics: pd.DataFrame, others: Mapping[str, pd.DataFrame]) -> go.Figure | None:
    """Task loss, raw alignment loss and its weight over training; None where no loss warms up."""
    names = [match[1] for key in metrics.columns if (match := _WEIGHT.fullmatch(key))]
    if not names or not curve(metrics, f"loss/{names[0]}"):
        return None
    panels = {
        "train/loss": "Task loss (nats)",
        f"loss/{names[0]}": "Alignment loss",
        f"loss/{names[0]}/weight": "Weight of the alignment loss",
    }
    fig = make_subplots(rows=1, cols=3, subplot_titles=[*panels.values()], horizontal_spacing=0.08)
    runs = {"this run": metrics, **others}
    for column, key in enumerate(panels, 1):
        for index, (name, logged) in enumerate(runs.items()):
            found = curve(logged, key)
            if not found:
                continue
            own = name == "this run"
            smooth = running_mean(found) if key == "train/loss" else bin_means(found)
            look = {} if own else {"dash": "dash"}
            color = BLUE if own else run_color(index - 1)
            trace = line(smooth, escape_label(name), color, 2, legendgroup=name, **look)
            trace.showlegend = column == 1
            fig.add_trace(trace, row=1, col=column)
    fig.update_xaxes(title_text="optimizer step")
    return polish(fig, 320, legend=True)


def _told(summary: dict[str, Any]) -> dict[str, Any]:
    found = section(summary, "alignment")
    return found if number(found, "after", "distance") is not None else {}


def _sizes(row: dict[str, Any]) -> str:
    samples, right = number(row, "samples"), number(row, "successful")
    if samples is None or right is None:
        return "the training samples"
    return f"{samples:,.0f} samples, of which {right:,.0f} were answered rightly before"


def _table(rows: dict[str, dict[str, Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS.values())
    body = "".join(_row(name, row) for name, row in rows.items())
    return f"<table><thead><tr><th>Model</th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(name: str, row: dict[str, Any]) -> str:
    mark = ' class="own"' if name == "this run" else ""
    cells = "".join(f"<td>{_change(row, key)}</td>" for key in _COLUMNS)
    return f"<tr{mark}><th>{escape(name)}</th>{cells}</tr>"


def _change(row: dict[str, Any], key: str) -> str:
    values = [number(row, when, key) for when in ("before", "after")]
    shown = [NOTHING if value is None else digits(value, 3) for value in values]
    return " → ".join(shown)
