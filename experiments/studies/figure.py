"""The figure of a study: metrics by arm, and a curve over training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from routerlab.comparison.statistics import interval

from .definition import Study
from .results import Row, read_metrics
from .table import by_seed, name

_INK, _FAINT, _MARK, _LEAK = "#222222", "#9aa0a6", "#1f5fa8", "#c0392b"


def draw(study: Study, rows: Sequence[Row], output: Path, to: Path) -> None:
    """Writes a PNG with a panel for each of ``study.panels``, and one for ``study.curve``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [row for row in rows if row["state"] == "done"]
    panels = [m for m in study.panels if any(m in row for row in done)]
    arms = [arm for arm in study.compared if by_seed(done, arm, panels[0])]
    arms.sort(
        key=lambda arm: interval(list(by_seed(done, arm, panels[0]).values())).mean,
        reverse=panels[0] == "accuracy",
    )
    count = len(panels) + (study.curve is not None)
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        size = (
            1.6 + 3.6 * len(panels) + 5 * (count > len(panels)),
            max(2.8, 1.2 + 0.27 * len(arms)),
        )
        figure, axes = plt.subplots(1, count, figsize=size, squeeze=False, layout="constrained")
        for index, metric in enumerate(panels):
            _intervals(axes[0, index], study, done, arms, metric, labelled=index == 0)
        if study.curve is not None:
            _curve(axes[0, -1], study, done, arms, output)
        figure.suptitle(study.question, fontsize=10, color=_INK)
        figure.savefig(to, dpi=160, metadata={"Software": None})
        plt.close(figure)


def _intervals(
    axis: Any, study: Study, rows: Sequence[Row], arms: Sequence[str], metric: str, labelled: bool
) -> None:
    """A dot a seed, the mean and its 95% interval, best arm of the first panel on top."""
    for place, arm in enumerate(arms):
        values = list(by_seed(rows, arm, metric).values())
        if not values:
            continue
        color = _LEAK if _leaks(rows, arm) else _MARK
        axis.plot(values, [place] * len(values), "|", color=_FAINT, markersize=7, zorder=1)
        found = interval(values)
        axis.errorbar(
            found.mean,
            place,
            xerr=found.half,
            fmt="o",
            color=color,
            markersize=4,
            capsize=2,
            zorder=2,
        )
        if arm == study.baseline:
            axis.axvline(found.mean, color=_FAINT, linewidth=0.8, linestyle=":", zorder=0)
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.set_yticks(range(len(arms)), [study.label(arm) for arm in arms] if labelled else [])
    if labelled:
        for tick, arm in zip(axis.get_yticklabels(), arms, strict=True):
            tick.set_fontweight("bold" if arm == study.baseline else "normal")
            tick.set_color(_LEAK if _leaks(rows, arm) else _INK)
    seeds = len({row["seed"] for row in rows})
    ahead = "\nred: leaks the future" if any(_leaks(rows, arm) for arm in arms) and labelled else ""
    interval_text = f" (mean and 95% interval, {seeds} seeds)" if seeds > 1 else " (one seed)"
    axis.set_xlabel(name(metric) + interval_text + ahead)
    axis.grid(axis="x", color="#e5e7ea", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)


def _curve(axis: Any, study: Study, rows: Sequence[Row], arms: Sequence[str], output: Path) -> None:
    """Mean over seeds of a column of metrics.csv at every logged step, and the range of seeds."""
    import matplotlib

    column = study.curve or ""

    colors = matplotlib.colormaps["tab10" if len(arms) <= 10 else "tab20"]
    for index, arm in enumerate(a for a in study.arms if a in arms):
        seeds = [row["seed"] for row in rows if row["arm"] == arm]
        by_step: dict[float, list[float]] = {}
        for seed in seeds:
            for row in read_metrics(study.run_path(output, arm, seed)):
                if column in row:
                    by_step.setdefault(row["step"], []).append(row[column])
        if not by_step:  # an arm without routers
            continue
        steps = sorted(by_step)
        color = colors(index)
        means = [sum(by_step[s]) / len(by_step[s]) for s in steps]
        axis.plot(steps, means, color=color, linewidth=1.1, label=study.label(arm))
        low, high = [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps]
        axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    if not axis.lines:
        raise ValueError(f"{study.name}: no run logged {column!r}, the figure's curve")
    if axis.lines[0].get_xdata()[0] <= 0.05 * axis.lines[0].get_xdata()[-1]:  # the start matters
        axis.set_xscale("log")
    axis.set_xlabel("training step")
    axis.set_ylabel(name(column.rsplit("/", 1)[-1]))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(color="#e5e7ea", linewidth=0.6)


def _leaks(rows: Sequence[Row], arm: str) -> bool:
    return any(row["arm"] == arm and row.get("looks_ahead") == "in evaluation" for row in rows)
