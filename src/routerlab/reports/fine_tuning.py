"""What the page of a fine-tuning run shows in place of bits per byte: accuracies."""

from collections.abc import Iterator
from html import escape
from typing import Any

from routerlab.reports import accuracy_figures, figures
from routerlab.reports.alignment import alignment_sections
from routerlab.reports.run_files import RunFiles, last, number, section
from routerlab.reports.sections import (
    Section,
    aux_section,
    figure_section,
    nothing,
    router_sections,
    training_sections,
)
from routerlab.reports.tables import NOTHING, amount, digits, duration, steps, tile, tokens

Row = dict[str, Any]  # accuracy, its interval, loss, by_task


def is_fine_tuning(run: RunFiles) -> bool:
    """Whether the run is judged by accuracy."""
    return number(run.summary, "val", "accuracy") is not None or "val/accuracy" in run.metrics


def tiles(run: RunFiles) -> str:
    """The row of headline numbers."""
    own, trainable = _own(run), number(run.summary, "parameters", "trainable")
    total = amount(number(run.summary, "parameters", "total"))
    leaks = run.summary.get("looks_ahead") == "in evaluation"
    parts = [
        tile(
            "Accuracy",
            percent(number(own, "accuracy")),
            "leaking the future" if leaks else _interval(own) or "held-out items",
            "bad" if leaks else "",
        ),
        *(_against(name, other, own) for name, other in _others(run).items()),
        tile("Validation loss", digits(number(own, "loss")), "nats per answer token"),
        tile("Trainable parameters", amount(trainable), f"of {total}"),
        *_support(run),
        tile(
            "Training time",
            duration(number(run.summary, "train_seconds")),
            f"{steps(run)} steps, {tokens(run)} tokens",
        ),
    ]
    return f'<div class="tiles">{"".join(parts)}</div>'


def sections(run: RunFiles) -> Iterator[Section]:
    """The cards of the page."""
    yield Section(
        "accuracy",
        "Accuracy",
        "Accuracy",
        accuracy_tables(run) or nothing("accuracy"),
        "Held-out items that no training step and no validation curve has seen; in brackets the "
        "95 % interval (Wilson), which knows of the items' number and not of other seeds.",
    )
    curves = {name: other.metrics for name, other in run.baselines.items()}
    base = number(run.summary, "base", "accuracy")
    yield figure_section(
        "fig-accuracy",
        "Learning",
        "Accuracy over training",
        accuracy_figures.accuracy_figure(run.metrics, curves, base),
        "Measured on the items of the validations, with 95 % intervals; other runs of this job are "
        "dashed, and the dotted line is the base model on the items of the last evaluation.",
    )
    yield figure_section(
        "fig-loss",
        "Loss",
        "Loss",
        accuracy_figures.answer_loss_figure(run.metrics, curves),
        "Over answer tokens alone; the faint line is each logged step, the bold one its running "
        "mean.",
    )
    yield from alignment_sections(run)
    if run.summary.get("layers") or figures.support_figure(run.metrics) is not None:
        yield from _routing(run)
    yield from training_sections(run)


def accuracy_tables(run: RunFiles) -> str | None:
    """The base model, the other runs of this job and this run; then task by task. None without
    any accuracy.
    """
    rows = _others(run) | {"this run": _own(run)}
    if all(number(row, "accuracy") is None for row in rows.values()):
        return None
    own = number(rows["this run"], "accuracy")
    body = "".join(_row(name, row, own) for name, row in rows.items())
    heads = ("accuracy", "95 % interval", "difference", "loss", "trainable")
    head = "".join(f"<th>{name}</th>" for name in heads)
    table = f"<table><thead><tr><th>Model</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return table + _task_table(rows)


def percent(value: float | None) -> str:
    """A share as 83.1 %."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def _own(run: RunFiles) -> Row:
    """The run's last evaluation; before its end, the last validation."""
    if number(run.summary, "val", "accuracy") is not None:
        return section(run.summary, "val") | {"parameters": section(run.summary, "parameters")}
    names = ("accuracy", "accuracy_low", "accuracy_high", "loss")
    return {name: last(run.metrics, f"val/{name}") for name in names}


def _others(run: RunFiles) -> dict[str, Row]:
    base = section(run.summary, "base")
    found = {"base model": base} if base else {}
    named = section(run.summary, "baselines") or {n: _own(r) for n, r in run.baselines.items()}
    return found | {name: section(named, name) for name in named}


def _interval(row: Row) -> str:
    low, high = number(row, "accuracy_low"), number(row, "accuracy_high")
    return "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %"


def _against(name: str, other: Row, own: Row) -> str:
    theirs, ours = number(other, "accuracy"), number(own, "accuracy")
    if theirs is None or ours is None:
        return tile(f"Against {name}", NOTHING, "not recorded")
    mood = "good" if ours > theirs else "bad" if ours < theirs else ""
    overlap = (number(own, "accuracy_low") or 0) <= (number(other, "accuracy_high") or 1) and (
        number(other, "accuracy_low") or 0
    ) <= (number(own, "accuracy_high") or 1)
    detail = f"points; {percent(theirs)}" + (", intervals overlap" if overlap else "")
    return tile(f"Against {name}", _points(ours - theirs), detail, "" if overlap else mood)


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")


def _support(run: RunFiles) -> Iterator[str]:
    layers = run.summary.get("layers")
    rows = layers if isinstance(layers, list) else []
    found = [x for row in rows if (x := number(row, "ess_mean")) is not None]
    if found:
        soft = [x for row in rows if (x := number(row, "probs_ess_mean")) is not None]
        detail = f"softmax: {digits(sum(soft) / len(soft), 3)}" if soft else "mean over layers"
        yield tile("Effective experts", digits(sum(found) / len(found), 3), detail)


def _routing(run: RunFiles) -> Iterator[Section]:
    yield figure_section(
        "fig-support",
        "ESS",
        "Effective support size",
        figures.support_figure(run.metrics),
        "How many experts count for a token: 1 means that one has all the weight, K equal weights "
        "give K. Soft routers tend to fall towards 1 in training even where the load is even; thin "
        "lines are layers from first (dark) to last (light), the black line their mean."
        + figures.thinning_note(run.metrics),
    )
    policy = accuracy_figures.policy_figure(run.metrics)
    if policy is not None:
        yield figure_section(
            "fig-policy",
            "Policy",
            "Policy gradient",
            policy,
            "The router learns from how the loss differs between samples of its choice: variance "
            "is the noise of one step's gradient, signal to noise the squared norm of its mean "
            "over that variance. Samples that all have one loss teach nothing.",
        )
    yield from router_sections(run)
    yield aux_section(run)


def _row(name: str, row: Row, own: float | None) -> str:
    value, mark = number(row, "accuracy"), ' class="own"' if name == "this run" else ""
    gap = NOTHING
    if value is not None and own is not None and not mark:
        gap = _points(value - own)
    cells = [percent(value), _interval(row) or NOTHING, gap, digits(number(row, "loss"))]
    cells.append(amount(number(row, "parameters", "trainable")))
    body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr{mark}><th>{escape(name)}</th>{body}</tr>"


def _task_table(rows: dict[str, Row]) -> str:
    """Accuracy of every model on every task, where there are several."""
    tasks = list(section(rows["this run"], "by_task"))
    if len(tasks) < 2:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in rows)
    body = ""
    for task in tasks:
        cells = [section(row, "by_task", task) for row in rows.values()]
        body += f"<tr><th>{escape(task)}</th>" + "".join(map(_task_cell, cells)) + "</tr>"
    head = f"<thead><tr><th>Task</th>{head}</tr></thead>"
    return f'<table id="tasks">{head}<tbody>{body}</tbody></table>'


def _task_cell(row: Row) -> str:
    interval = _interval(row)
    small = f' <span class="detail">({escape(interval)})</span>' if interval else ""
    return f"<td>{percent(number(row, 'accuracy'))}{small}</td>"
