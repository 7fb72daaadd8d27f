"""Plotly line figures of fine-tuning runs; None when nothing was logged."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from routerlab.reports.figures import (
    BASELINE_STYLES,
    BLUE,
    COLORS,
    DOTS,
    VERMILLION,
    bin_means,
    escape_label,
    keep_extremes,
    line,
    panels_figure,
    polish,
    running_mean,
)
from routerlab.reports.run_files import Curve, curve

POLICY_PANELS = {
    "policy/grad_variance": "Variance of the gradient",
    "policy/snr": "Signal to noise of the gradient",
    "policy/grad_norm": "Norm of the gradient",
    "policy/loss_std": "Loss over samples: deviation",
    "policy/loss_range": "Loss over samples: range",
}


def accuracy_figure(
    metrics: pd.DataFrame, others: Mapping[str, pd.DataFrame], base: float | None
) -> go.Figure | None:
    """Validation accuracy over training, with its interval; other runs dashed, the base a line."""
    found = curve(metrics, "val/accuracy")
    if not found:
        return None
    fig = go.Figure()
    low, high = curve(metrics, "val/accuracy_low"), curve(metrics, "val/accuracy_high")
    bars = {}
    if len(low) == len(high) == len(found):
        ends = {"array": high.values - found.values, "arrayminus": found.values - low.values}
        bars = {"error_y": {"type": "data", "symmetric": False, "thickness": 1, "width": 3} | ends}
    fig.add_trace(line(found, "this run", VERMILLION, 2, **DOTS, **bars))
    for number, (name, logged) in enumerate(others.items()):
        if theirs := curve(logged, "val/accuracy"):
            fig.add_trace(
                line(theirs, escape_label(name), run_color(number), 2, dash="dash", **DOTS)
            )
    if base is not None:
        dash, color = BASELINE_STYLES[0]
        steps = np.array([0.0, found.steps.max()])
        label = f"base model {base:.1%}"
        fig.add_trace(line(Curve(steps, np.array([base, base])), label, color, 1.5, dash=dash))
    fig.update_yaxes(title_text="accuracy", tickformat=".0%")
    fig.update_xaxes(title_text="optimizer step", rangemode="tozero")
    return polish(fig, 400, legend=True).update_layout(margin_t=56)


def answer_loss_figure(
    metrics: pd.DataFrame, others: Mapping[str, pd.DataFrame]
) -> go.Figure | None:
    """Training and validation loss in nats per answer token; validations of other runs dashed."""
    train, val = curve(metrics, "train/loss"), curve(metrics, "val/loss")
    if not train and not val:
        return None
    fig = go.Figure()
    if train:
        fig.add_trace(line(keep_extremes(train), "train, logged steps", BLUE, 1, opacity=0.4))
        fig.add_trace(line(keep_extremes(running_mean(train)), "train, running mean", BLUE, 2.5))
    if val:
        fig.add_trace(line(val, "validation", VERMILLION, 1.5, **DOTS))
    if sampled := bin_means(curve(metrics, "val/sampled_loss")):
        label = "validation, sampled routing"
        fig.add_trace(line(sampled, label, VERMILLION, 1.5, dash="dot", **DOTS))
    for number, (name, logged) in enumerate(others.items()):
        if theirs := curve(logged, "val/loss"):
            label = escape_label(f"{name}, validation")
            fig.add_trace(line(theirs, label, run_color(number), 1.5, dash="dash", **DOTS))
    fig.update_yaxes(title_text="nats per answer token")
    fig.update_xaxes(title_text="optimizer step")
    return polish(fig, 400, legend=True).update_layout(margin_t=56)


def policy_figure(metrics: pd.DataFrame) -> go.Figure | None:
    """The policy gradient of sampling routers and the losses that make it."""
    return panels_figure(metrics, POLICY_PANELS)


def run_color(number: int) -> str:
    """The colour of the n-th other run of a job."""
    return COLORS[2:][number % len(COLORS[2:])]
