"""Plotly figures of groups of runs; None when there is nothing to draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from routerlab.comparison.curves import Band
from routerlab.comparison.group_routing import Agreements
from routerlab.reports.figures import COLORS, escape_label, polish
from routerlab.reports.heat_maps import maps

MAX_GROUPS = 2 * len(COLORS)  # of a figure: each colour solid and dashed
_MAX_LABEL = 34  # characters in a legend
_GAP = 64  # pixels between panels
_EARLY = 0.1  # the share of training whose values need not fit into a panel that hides them


@dataclass(frozen=True)
class Panel:
    """A titled panel: a band for each group that has one. ``hides_start``: it shows the range of
    the later nine tenths of training, where the groups can be told apart.
    """

    title: str
    unit: str
    bands: Mapping[str, Band]
    hides_start: bool = False


def panels_figure(
    panels: Sequence[Panel], labels: Sequence[str], columns: int, height: int
) -> go.Figure | None:
    """Panels of ``height`` pixels with one legend on the right; a group keeps its colour."""
    panels = [panel for panel in panels if panel.bands]
    if not panels:
        return None
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    inner = rows * height + (rows - 1) * _GAP
    fig = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[panel.title for panel in panels],
        vertical_spacing=_GAP / inner if rows > 1 else 0,
        horizontal_spacing=0.09,
    )
    named: set[str] = set()
    for place, panel in enumerate(panels):
        where: dict[str, Any] = {"row": place // columns + 1, "col": place % columns + 1}
        for label in labels:
            if label in panel.bands:
                _draw(fig, panel.bands[label], label, labels.index(label), label in named, where)
                named.add(label)
        fig.update_yaxes(title_text=panel.unit, range=_range(panel), **where)
    for place in range(len(panels) - columns, len(panels)):
        where = {"row": place // columns + 1, "col": place % columns + 1}
        fig.update_xaxes(title_text="optimizer step", **where)
    fig = polish(fig, inner + 104, legend=False)
    fig.update_xaxes(matches="x")  # zoomed together
    legend = {"orientation": "v", "x": 1.015, "xanchor": "left", "yref": "paper"}
    return fig.update_layout(showlegend=True, legend=legend)


def loads_figure(loads: Mapping[str, Mapping[str, np.ndarray]]) -> go.Figure | None:
    """One heat map a group, layers by experts; colour is load relative to an even share."""
    loads = {label: layers for label, layers in loads.items() if layers}
    if not loads:
        return None
    columns = min(len(loads), 3)
    deepest = max(map(len, loads.values()))
    fig = maps([shortened(label) for label in loads], columns, min(max(110, 22 * deepest), 420))
    for place, layers in enumerate(loads.values()):
        table = np.full((len(layers), max(map(len, layers.values()))), np.nan, dtype=np.float32)
        for row, load in enumerate(layers.values()):
            table[row, : len(load)] = load * len(load)
        trace = go.Heatmap(
            z=table,
            y=np.arange(len(layers)),
            customdata=np.repeat(np.array([*layers], dtype=object)[:, None], table.shape[1], 1),
            coloraxis="coloraxis",
            hovertemplate="%{customdata}, expert %{x}: %{z:.3f} × 1/E<extra></extra>",
        )
        fig.add_trace(trace, place // columns + 1, place % columns + 1)
    integers = {"dtick": max(1, deepest // 8), "autorange": "reversed", "showgrid": False}
    fig.update_yaxes(**integers, matches=None, showticklabels=True)
    fig.update_yaxes(title_text="layer", title_standoff=4, col=1)
    fig.update_xaxes(showgrid=False)
    for column in range(columns):
        row = (len(loads) - 1 - column) // columns + 1
        fig.update_xaxes(title_text="expert", row=row, col=column + 1)
    return fig


def agreement_figure(found: Agreements, labels: Sequence[str]) -> go.Figure | None:
    """Groups by groups: agreement above chance; the diagonal is that between seeds of a group."""
    labels = [x for x in labels if any((x, y) in found.cells for y in labels)]
    if not labels:
        return None
    z = [[found.above_chance(row, column) for column in labels] for row in labels]
    hover = [[_details(found, row, column) for column in labels] for row in labels]
    names = [escape_label(shortened(label)) for label in labels]
    bar = {"lenmode": "pixels", "len": 220, "y": 1, "yanchor": "top", "thickness": 12}
    bar |= {"title": {"text": "above<br>chance<br>&nbsp;", "font": {"size": 12}}}
    trace = go.Heatmap(
        x=names,
        y=names,
        z=np.array(z, dtype=np.float32),
        customdata=hover,
        colorscale="Blues",
        zmin=0,
        zmax=1,
        xgap=2,
        ygap=2,
        texttemplate="%{z:.2f}",
        textfont={"size": 13},
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorbar=bar | {"outlinewidth": 0},
    )
    width = min(1.0, 0.115 * len(labels))  # cells of about a hundred pixels
    fig = polish(go.Figure(trace), 150 + 44 * len(labels), legend=False)
    fig.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    fig.update_xaxes(showgrid=False, ticks="", tickangle=-30, domain=[0, width])
    return fig.update_traces(colorbar_x=width + 0.01)


def shortened(label: str) -> str:
    """A label with its middle left out, if it is long."""
    if len(label) <= _MAX_LABEL:
        return label
    head = _MAX_LABEL // 2
    return f"{label[:head]}…{label[head + 1 - _MAX_LABEL :]}"


def _draw(
    fig: go.Figure, band: Band, label: str, number: int, named: bool, where: dict[str, Any]
) -> None:
    """The mean of a group as a line over its shaded interval."""
    color = COLORS[number % len(COLORS)]
    dash = "solid" if number < len(COLORS) else "dash"
    name = escape_label(shortened(label))
    steps, mean = band.steps.astype(np.float32), band.mean.astype(np.float32)
    if band.half is not None:
        half = band.half.astype(np.float32)
        shade = go.Scatter(
            x=np.concatenate([steps, steps[::-1]]),
            y=np.concatenate([mean + half, (mean - half)[::-1]]),
            fill="toself",
            fillcolor=color,
            opacity=0.15,
            mode="none",
            legendgroup=label,
            showlegend=False,
            hoverinfo="skip",
        )
        fig.add_trace(shade, **where)
    few = len(steps) <= 30
    line = go.Scatter(
        x=steps,
        y=mean,
        name=name,
        mode="lines+markers" if few else "lines",
        marker={"size": 5},
        line={"color": color, "width": 2, "dash": dash},
        legendgroup=label,
        showlegend=not named,
        hovertemplate="step %{x:,.0f}: %{y:.4g}",
    )
    fig.add_trace(line, **where)


def _range(panel: Panel) -> list[float]:
    """Room for all means, and for intervals up to half as much again: those of two seeds can be
    thirteen times their standard error, and would leave the lines flat.
    """
    bands = [*panel.bands.values()]
    start = _EARLY * max(float(band.steps[-1]) for band in bands) if panel.hides_start else 0
    low, high, lowest, highest = np.inf, -np.inf, np.inf, -np.inf
    for band in bands:
        shown = band.steps >= start
        half = np.zeros_like(band.mean) if band.half is None else band.half
        if shown.any():
            mean, half = band.mean[shown], half[shown]
            low, high = min(low, np.nanmin(mean)), max(high, np.nanmax(mean))
            lowest = min(lowest, np.nanmin(mean - half))
            highest = max(highest, np.nanmax(mean + half))
    room = (high - low or 0.02 * abs(high) or 0.02) / 2
    bottom = max(lowest, low - room) if low < 0 else max(lowest, low - room, 0)
    pad = 0.1 * room
    return [float(bottom) - pad, float(min(highest, high + room)) + pad]


def _details(found: Agreements, row: str, column: str) -> str:
    pairs: Any = found.cells.get((row, column), [])
    if not pairs:
        return ""
    layers = [layer for pair in pairs for layer in pair]
    agreement, chance = (
        float(np.nanmean([getattr(layer, name) for layer in layers]))
        for name in ("agreement", "chance")
    )
    who = f"{row}, seeds among themselves" if row == column else f"{row} – {column}"
    by_layer = " ".join(f"{layer.above_chance:.2f}" for layer in pairs[0])
    return (
        f"{escape_label(who)}<br>agreement {agreement:.3f}, by chance {chance:.3f}"
        f"<br>above chance by layer: {by_layer}"
    )
