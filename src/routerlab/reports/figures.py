"""Plotly line figures, each a pure function of the metrics frame; None when nothing was logged."""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from routerlab.reports.run_files import Curve, curve

# Okabe and Ito's colours, safe for every common kind of colour blindness.
BLUE, VERMILLION = "#0072B2", "#D55E00"
COLORS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GRID = "#1f2937", "#e5e7eb"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
BASELINE_STYLES = (("dot", "#8b93a1"), ("dash", "#6b7280"), ("dashdot", "#374151"))
DOTS = {"mode": "lines+markers", "marker": {"size": 7, "symbol": "diamond"}}  # of validations

MAX_POINTS = 1500
MAX_BINS = 300
MAX_LAYERS_IN_LEGEND = 16
MAX_LAYERS = 24  # of a figure; of a deeper model, that many evenly spaced ones
PANEL_HEIGHT, ROW_GAP = 210, 58
ENTROPY_PANELS = {
    "load_entropy": "Load entropy",
    "mean_entropy": "Mean token entropy",
    "entropy_of_mean": "Entropy of the mean",
    "mutual_information": "Mutual information",
}
SUPPORT_PANELS = {
    "ess_mean": "Weights in use: mean",
    "ess_p05": "Weights in use: 5th percentile",
    "ess_min": "Weights in use: minimum",
    "probs_ess_mean": "Softmax: mean",
    "probs_ess_p05": "Softmax: 5th percentile",
    "probs_ess_min": "Softmax: minimum",
}
TRAINING_PANELS = {
    "train/grad_norm": "Gradient norm",
    "train/learning_rate": "Learning rate",
    "train/tokens_per_second": "Tokens per second",
}
ROUTER_KEY = re.compile(r"(?:val/)?router/(?P<layer>.+)/(?P<metric>[^/]+)")


def loss_figure(metrics: pd.DataFrame, baselines: dict[str, float]) -> go.Figure | None:
    """Training and validation curves in bits per byte (else nats per token) over n-gram lines."""
    in_bits = any(curve(metrics, f"{split}/bits_per_byte") for split in ("train", "val"))
    key = "bits_per_byte" if in_bits else "loss"
    train, val = curve(metrics, f"train/{key}"), curve(metrics, f"val/{key}")
    if not train and not val:
        return None
    fig = go.Figure()
    if train:
        fig.add_trace(line(keep_extremes(train), "train, logged steps", BLUE, 1, opacity=0.4))
        fig.add_trace(line(keep_extremes(running_mean(train)), "train, running mean", BLUE, 2.5))
    if val:
        fig.add_trace(line(val, "validation", VERMILLION, 1.5, **DOTS))
    steps = np.concatenate([train.steps, val.steps])
    ends = np.array([steps.min(), steps.max()])
    levels = sorted(baselines.items(), key=lambda item: -item[1]) if in_bits else []
    for number, (name, level) in enumerate(levels):
        dash, color = BASELINE_STYLES[number % len(BASELINE_STYLES)]
        flat = Curve(ends, np.array([level, level]))
        label = escape_label(f"{name} {level:.3f}")
        fig.add_trace(line(flat, label, color, 1.5, dash=dash))
    fig.update_yaxes(title_text="bits per byte" if in_bits else "nats per token")
    fig.update_xaxes(title_text="optimizer step")
    return polish(fig, 400, legend=True).update_layout(margin_t=56)


def entropy_figure(metrics: pd.DataFrame) -> go.Figure | None:
    """The four entropies over training, one panel each: thin layers, bold mean, val diamonds."""
    return _router_panels(metrics, ENTROPY_PANELS)


def support_figure(metrics: pd.DataFrame) -> go.Figure | None:
    """Effective support sizes over training, of the weights in use and of the softmax."""
    return _router_panels(metrics, SUPPORT_PANELS)


def diagnostics_figure(metrics: pd.DataFrame) -> go.Figure | None:
    """Every other router metric that the run logged, drawn like the entropies."""
    found = dict.fromkeys(match["metric"] for match in _router_keys(metrics))
    elsewhere = ENTROPY_PANELS | SUPPORT_PANELS
    titles = {name: _title(name) for name in found if name not in elsewhere}
    return _router_panels(metrics, titles)


def aux_figure(metrics: pd.DataFrame) -> go.Figure | None:
    """One panel of raw values for each auxiliary loss, then all of them weighted in one panel."""
    keys = [key for key in metrics.columns if key.startswith("loss/") and curve(metrics, key)]
    names = list(dict.fromkeys(key.removeprefix("loss/").removesuffix("/weighted") for key in keys))
    if not names:
        return None
    fig, places = _grid([*map(_title, names), "All, times their weight"])
    for number, (name, place) in enumerate(zip(names, places, strict=False)):
        color = COLORS[number % len(COLORS)]
        raw = bin_means(curve(metrics, f"loss/{name}"))
        weighted = bin_means(curve(metrics, f"loss/{name}/weighted"))
        fig.add_trace(line(raw, _title(name), color, 2, legendgroup=name), *place)
        again = {"legendgroup": name, "showlegend": False}
        fig.add_trace(line(weighted, _title(name), color, 2, **again), *places[-1])
    return polish(fig, _grid_height(len(places)), legend=True)


def training_figure(metrics: pd.DataFrame) -> go.Figure | None:
    """Gradient norm, learning rate and speed over training."""
    return panels_figure(metrics, TRAINING_PANELS)


def panels_figure(metrics: pd.DataFrame, titles: dict[str, str]) -> go.Figure | None:
    """One panel for each of the keys that were logged."""
    panels = {key: title for key, title in titles.items() if curve(metrics, key)}
    if not panels:
        return None
    fig, places = _grid(list(panels.values()))
    for (key, title), place in zip(panels.items(), places, strict=True):
        values = keep_extremes(curve(metrics, key))
        fig.add_trace(line(values, title, BLUE, 1.5), *place)
    return polish(fig, _grid_height(len(panels)), legend=False)


def smoothing_window(logged: Curve) -> int:
    """How many logged values the running mean of the loss curve spans."""
    return len(logged) // 80 * 2 + 1  # odd, so that the mean is not shifted by half a value


def running_mean(logged: Curve) -> Curve:
    """The centred mean over `smoothing_window` values, over fewer at both ends."""
    window = np.ones(smoothing_window(logged))
    counts = np.convolve(np.ones(len(logged)), window, mode="full")
    sums = np.convolve(logged.values, window, mode="full")
    middle = slice(len(window) // 2, len(window) // 2 + len(logged))
    return Curve(logged.steps, sums[middle] / counts[middle])


def bin_means(logged: Curve) -> Curve:
    """At most `MAX_BINS` points: means of consecutive values at their mean step."""
    if len(logged) <= MAX_BINS:
        return logged
    steps = [part.mean() for part in np.array_split(logged.steps, MAX_BINS)]
    values = [part.mean() for part in np.array_split(logged.values, MAX_BINS)]
    return Curve(np.array(steps), np.array(values))


def keep_extremes(logged: Curve) -> Curve:
    """At most `MAX_POINTS` points, the lowest and highest of each stretch: no spike is lost."""
    if len(logged) <= MAX_POINTS:
        return logged
    stretches = np.array_split(np.arange(len(logged)), MAX_POINTS // 2)
    lows = [stretch[logged.values[stretch].argmin()] for stretch in stretches]
    highs = [stretch[logged.values[stretch].argmax()] for stretch in stretches]
    kept = np.unique([*lows, *highs])
    return Curve(logged.steps[kept], logged.values[kept])


def polish(fig: go.Figure, height: int, legend: bool) -> go.Figure:
    """The same figure in the report's light style, with room on top for a legend if it has one."""
    axis = {"gridcolor": GRID, "linecolor": "#d1d5db", "zeroline": False, "automargin": True}
    axis |= {"title_font_size": 13, "title_standoff": 8, "exponentformat": "e", "minexponent": 5}
    fig.update_layout(
        template=go.layout.Template(),
        height=height + (40 if legend else 0),
        margin={"l": 56, "r": 16, "t": 92 if legend else 52, "b": 52},
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        hoverlabel={"namelength": -1},
        showlegend=legend,
        # In the container's frame, so that a panel's title can never meet it.
        legend={"orientation": "h", "yref": "container", "y": 1, "yanchor": "top", "x": 0},
    )
    fig.update_xaxes(**axis)
    fig.update_yaxes(**axis)
    return fig.update_annotations(font={"size": 14, "color": INK})


def escape_label(text: str) -> str:
    """Text that plotly draws as it is, instead of reading its pseudo-HTML tags."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def thinned(layers: list[str], most: int = MAX_LAYERS) -> list[str]:
    """At most ``most`` of the layers, evenly spaced, the first and the last among them."""
    if len(layers) <= most:
        return layers
    places = np.linspace(0, len(layers) - 1, most).round().astype(int)
    return [layers[place] for place in places]


def thinning_note(metrics: pd.DataFrame) -> str:
    """The sentence for a caption where not all layers are drawn."""
    layers = {match["layer"] for match in _router_keys(metrics)} - {"mean"}
    if len(layers) <= MAX_LAYERS:
        return ""
    return f" Of {len(layers)} layers, {MAX_LAYERS} evenly spaced ones are drawn."


def _router_keys(metrics: pd.DataFrame) -> list[re.Match[str]]:
    logged = metrics.columns[metrics.notna().any()]
    return [match for key in logged if (match := ROUTER_KEY.fullmatch(key))]


def _router_panels(metrics: pd.DataFrame, titles: dict[str, str]) -> go.Figure | None:
    """One panel a metric; training values, or validation ones where training logged none."""
    keys = [match for match in _router_keys(metrics) if match["metric"] in titles]
    shown = [name for name in titles if any(match["metric"] == name for match in keys)]
    if not shown:
        return None
    layers = thinned(sorted({match["layer"] for match in keys} - {"mean"}))
    shades = [0.9 * i / max(1, len(layers) - 1) for i in range(len(layers))]
    sampled = sample_colorscale("Viridis", shades) if layers else []
    colors = {layer: str(color) for layer, color in zip(layers, sampled, strict=True)}
    fig, places = _grid([titles[name] for name in shown])
    in_legend: set[str] = set() if len(layers) <= MAX_LAYERS_IN_LEGEND else set(layers)
    for name, place in zip(shown, places, strict=True):
        for trace in _panel_traces(metrics, name, colors):
            trace.showlegend = str(trace.legendgroup) not in in_legend
            in_legend.add(str(trace.legendgroup))
            fig.add_trace(trace, *place)
        logged = [curve(metrics, match[0]).values for match in keys if match["metric"] == name]
        lowest = min(values.min() for values in logged)
        # An axis below zero would suggest that a share or a count can be negative.
        mode = "nonnegative" if lowest >= 0 else "normal"
        fig.update_yaxes(rangemode=mode, row=place[0], col=place[1])
    return polish(fig, _grid_height(len(places)), legend=True)


def _panel_traces(metrics: pd.DataFrame, name: str, colors: dict[str, str]) -> Iterator[go.Scatter]:
    """Layer lines, their mean, and the mean at each validation; nothing for what has no values."""
    trained = any(curve(metrics, f"router/{layer}/{name}") for layer in [*colors, "mean"])
    prefix = "router" if trained else "val/router"
    for layer, color in colors.items():
        if values := bin_means(curve(metrics, f"{prefix}/{layer}/{name}")):
            yield line(values, escape_label(layer), color, 1.2, legendgroup=layer)
    if mean := bin_means(curve(metrics, f"{prefix}/mean/{name}")):
        yield line(mean, "mean over layers", "#000000", 2.5, legendgroup="mean")
    if val := curve(metrics, f"val/router/mean/{name}"):
        marker = {"size": 8, "symbol": "diamond", "line": {"width": 1, "color": "white"}}
        style = {"mode": "markers", "marker": marker, "cliponaxis": False}
        yield line(val, "mean at validation", VERMILLION, 0, legendgroup="validation", **style)


def _grid(titles: list[str]) -> tuple[go.Figure, list[tuple[int, int]]]:
    """An empty grid of titled panels and the (row, column) of each."""
    columns = _columns(len(titles))
    rows = math.ceil(len(titles) / columns)
    gap = ROW_GAP / (rows * PANEL_HEIGHT + (rows - 1) * ROW_GAP)
    options: dict[str, Any] = {"vertical_spacing": gap, "horizontal_spacing": 0.08}
    fig = make_subplots(rows=rows, cols=columns, subplot_titles=titles, **options)
    places = [(i // columns + 1, i % columns + 1) for i in range(len(titles))]
    # The lowest panel of each column names the axis that all panels above it share.
    for row, column in places[-columns:]:
        fig.update_xaxes(title_text="optimizer step", row=row, col=column)
    return fig, places


def _columns(panels: int) -> int:
    return 3 if panels in (3, 5, 6, 9) else min(2, panels)


def _grid_height(panels: int) -> int:
    rows = math.ceil(panels / _columns(panels))
    return 104 + rows * PANEL_HEIGHT + (rows - 1) * ROW_GAP


def line(logged: Curve, name: str, color: str, width: int | float, **options: Any) -> go.Scatter:
    """A curve; ``options`` are plotly's, and ``dash``."""
    stroke = {"color": color, "width": width, "dash": options.pop("dash", "solid")}
    style = {"mode": "lines", "line": stroke, "marker_color": color} | options
    hover = "step %{x:,.0f}: %{y:.4g}"
    return go.Scatter(x=logged.steps, y=logged.values, name=name, hovertemplate=hover, **style)


def _title(name: str) -> str:
    return escape_label(name.replace("_", " ").capitalize())
