"""Plotly heat maps of expert load, pure functions of the recorded distributions."""

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from routerlab.reports.figures import escape_label, polish, thinned
from routerlab.reports.run_files import Distributions

MAX_COLUMNS = 200
MAX_EXPERTS_WITH_TEXT = 32
# Blue below, white at, red above an even share; fixed, so that reports can be compared.
SCALE: dict[str, Any] = {"colorscale": "RdBu_r", "cmin": 0, "cmid": 1, "cmax": 2}
COLOR_BAR: dict[str, Any] = {
    "tickvals": [0, 0.5, 1, 1.5, 2],
    "ticktext": ["0", "0.5", "1", "1.5", "≥ 2"],
    "thickness": 12,
    "title": {"text": "share ÷<br>even share<br>&nbsp;", "font": {"size": 12}},
    "outlinewidth": 0,
}


def load_figure(distributions: Distributions) -> go.Figure | None:
    """One heat map a layer: experts over steps, colour = load relative to an even 1/E."""
    layers = _by_layer(distributions, "router", "expert_load") or _by_layer(
        distributions, "val/router", "expert_load"
    )
    layers = {layer: history for layer, history in layers.items() if _vectors(history)}
    layers = {layer: layers[layer] for layer in thinned(list(layers))}
    if not layers:
        return None
    columns = min(len(layers), 3 if len(layers) > 6 else 2)
    experts = max(len(_vectors(history)[-1][1]) for history in layers.values())
    fig = maps(list(layers), columns, height=min(max(160, experts * 20), 280))
    for place, history in enumerate(layers.values()):
        steps, loads = _binned(_vectors(history))
        trace = go.Heatmap(
            x=steps,
            y=np.arange(loads.shape[1]),
            z=(loads * loads.shape[1]).T.astype(np.float32),
            coloraxis="coloraxis",
            hovertemplate="step %{x:,.0f}, expert %{y}: %{z:.3f} × 1/E<extra></extra>",
        )
        fig.add_trace(trace, place // columns + 1, place % columns + 1)
    fig.update_yaxes(dtick=max(1, math.ceil(experts / 16)))
    fig.update_yaxes(title_text="expert", title_standoff=4, col=1)
    last_row = math.ceil(len(layers) / columns)
    fig.update_xaxes(title_text="optimizer step", row=last_row)
    return fig


def domain_figure(
    distributions: Distributions, domains: list[str], top_k: float | None
) -> go.Figure | None:
    """One heat map a layer at its last validation: domains by experts, relative to top_k/E."""
    layers = _by_layer(distributions, "val/router", "expert_by_domain")
    tables = {layer: history[max(history)] for layer, history in layers.items()}
    tables = {layer: table for layer, table in tables.items() if table.ndim == 2 and table.size}
    tables = {layer: tables[layer] for layer in thinned(list(tables))}
    if not tables:
        return None
    num_domains, experts = np.max([table.shape for table in tables.values()], axis=0).tolist()
    columns = 2 if experts <= 10 and len(tables) > 1 else 1
    has_text = experts <= MAX_EXPERTS_WITH_TEXT
    fig = maps(list(tables), columns, height=num_domains * (30 if has_text else 20))
    for place, table in enumerate(tables.values()):
        even = (top_k or float(np.nanmean(table.sum(axis=1)))) / table.shape[1]
        names = [escape_label(name) for name in _row_names(domains, len(table))]
        trace = go.Heatmap(
            x=np.arange(table.shape[1]),
            y=names,
            z=(table / even).astype(np.float32),
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
            texttemplate="%{z:.2f}" if has_text else None,
            textfont={"size": 12 if experts <= 16 else 10},
            hovertemplate="%{y}, expert %{x}: %{z:.3f} × even share<extra></extra>",
        )
        fig.add_trace(trace, place // columns + 1, place % columns + 1)
    fig.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    fig.update_xaxes(dtick=max(1, math.ceil(experts / 32)), showgrid=False)
    fig.update_xaxes(title_text="expert", row=math.ceil(len(tables) / columns))
    return fig


def domain_step(distributions: Distributions) -> int | None:
    """The step of the last validation that recorded experts by domain."""
    layers = _by_layer(distributions, "val/router", "expert_by_domain")
    return max((max(history) for history in layers.values()), default=None)


def _by_layer(
    distributions: Distributions, prefix: str, name: str
) -> dict[str, dict[int, np.ndarray]]:
    """The histories named `<prefix>/<layer>/<name>`, by layer in order."""
    start, end = f"{prefix}/", f"/{name}"
    keys = sorted(key for key in distributions if key.startswith(start) and key.endswith(end))
    return {key[len(start) : -len(end)]: distributions[key] for key in keys}


def _vectors(history: dict[int, np.ndarray]) -> list[tuple[int, np.ndarray]]:
    """The steps in order whose value is a vector as long as the newest one."""
    newest = history[max(history)]
    if newest.ndim != 1 or not newest.size:
        return []
    records = [(step, history[step]) for step in sorted(history)]
    return [(step, load) for step, load in records if load.shape == newest.shape]


def _binned(history: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] and loads [S, E], S at most `MAX_COLUMNS`, by averaging consecutive records."""
    steps = np.array([step for step, _ in history], dtype=np.float64)
    loads = np.stack([load for _, load in history])
    groups = np.array_split(np.arange(len(steps)), min(len(steps), MAX_COLUMNS))
    binned_steps = np.array([steps[group].mean() for group in groups])
    return binned_steps, np.stack([loads[group].mean(axis=0) for group in groups])


def _row_names(domains: list[str], rows: int) -> list[str]:
    return domains if len(domains) == rows else [f"domain {row}" for row in range(rows)]


def maps(layers: list[str], columns: int, height: int) -> go.Figure:
    """An empty grid of heat maps of some height each, with one shared colour bar."""
    rows = math.ceil(len(layers) / columns)
    gap = 56
    inner = rows * height + (rows - 1) * gap
    fig = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[escape_label(layer) for layer in layers],
        vertical_spacing=gap / inner if rows > 1 else 0,
        horizontal_spacing=0.07,
        shared_yaxes=True,
    )
    fig = polish(fig, inner + 104, legend=False)
    bar = COLOR_BAR | {"lenmode": "pixels", "len": min(inner, 260), "y": 1, "yanchor": "top"}
    return fig.update_layout(coloraxis=SCALE | {"colorbar": bar})
