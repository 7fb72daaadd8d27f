"""Accuracies of a fine-tuning run, of the base model and of its baselines."""

from typing import Any

from rich.console import Console
from rich.table import Table

from routerlab.objectives.answers import wilson_interval
from routerlab.training import baselines
from routerlab.training.run_directory import RunDirectory

_BY_TASK = "val/accuracy/"
_INTERVAL = ("accuracy", "accuracy_low", "accuracy_high")
_OF_RUN = ("parameters", "train_seconds", "alignment")
_NUMBERS = ("loss", "sampled_loss", *_INTERVAL, "items")


def accuracies(scalars: dict[str, float]) -> dict[str, Any]:
    """The numbers of a validation by name, and by task: accuracy with its 95 % interval, items."""
    tasks = [key.removeprefix(_BY_TASK) for key in scalars if key.startswith(_BY_TASK)]
    overall = {name: scalars[f"val/{name}"] for name in _NUMBERS if f"val/{name}" in scalars}
    return overall | {"by_task": {task: _of_task(task, scalars) for task in tasks}}


def _of_task(task: str, scalars: dict[str, float]) -> dict[str, float]:
    accuracy, items = scalars[f"{_BY_TASK}{task}"], scalars[f"val/items/{task}"]
    ends = wilson_interval(accuracy * items, items)
    return dict(zip(_INTERVAL, (accuracy, *ends), strict=True)) | {"items": items}


def task_results(run: RunDirectory, scalars: dict[str, float]) -> dict[str, Any]:
    """The part of ``summary.json`` that is about accuracy: ``val`` of this run, ``base`` of the
    base model (None if it was not evaluated), ``baselines`` by name.
    """
    base = run.read_json("base.json")
    found = baselines.results(run)
    return {
        "val": accuracies(scalars),
        "base": None if base is None else accuracies(base),
        "baselines": {
            name: summary["val"] | {k: summary[k] for k in _OF_RUN if k in summary}
            for name, summary in found.items()
        },
    }


def interval(value: dict[str, Any]) -> str:
    """``83.1 % (80.2 to 85.7)``: an accuracy with its 95 % interval."""
    accuracy, low, high = (100 * value[name] for name in _INTERVAL)
    return f"{accuracy:.1f} % ({low:.1f} to {high:.1f})"


def print_accuracies(summary: dict[str, Any], console: Console) -> None:
    """Prints a row for the base model, each baseline and this run."""
    title = f"held-out accuracy on {summary['val']['items']:,.0f} items (95 % interval)"
    table = Table("", title=title, title_justify="left")
    for name in ("accuracy", "loss", "trainable"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = {"base model": summary["base"]} if summary["base"] else {}
    rows |= summary["baselines"]
    rows["this run"] = summary["val"] | {"parameters": summary["parameters"]}
    for name, row in rows.items():
        trainable = row.get("parameters", {}).get("trainable", 0)
        table.add_row(name, interval(row), f"{row['loss']:.3f}", f"{trainable:,}")
    console.print(table)
    tasks = summary["val"]["by_task"]
    if len(tasks) > 1:
        console.print("by task: " + ", ".join(f"{k} {interval(v)}" for k, v in tasks.items()))


def print_alignment(summary: dict[str, Any], console: Console) -> None:
    """Prints how the training samples were routed before and after, a row for each baseline that
    knows and for this run; nothing where none does.
    """
    rows = {n: row["alignment"] for n, row in summary["baselines"].items() if "alignment" in row}
    if "alignment" in summary:
        rows["this run"] = summary["alignment"]
    if not rows:
        return
    table = Table("", title="routing of the training samples, before > after", title_justify="left")
    columns = {
        "distance": "distance to\nneighbours",
        "similarity": "likeness to\nembeddings",
        "load_entropy": "load entropy\n(nats)",
        "accuracy": "answered\nrightly",
    }
    for name in columns.values():
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        both = [(row["before"][key], row["after"][key]) for key in columns]
        table.add_row(name, *(f"{before:.3g} > {after:.3g}" for before, after in both))
    console.print(table)
