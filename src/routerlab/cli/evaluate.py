"""``routerlab eval``: the newest checkpoint of a run on held-out data."""

import math
from collections.abc import Sequence
from typing import Any

from routerlab.cli.hydra_app import run


def main(argv: Sequence[str]) -> int:
    """Validates each job's run and prints what came out."""
    run("eval", "eval", argv, _evaluate)
    return 0


def _evaluate(cfg: Any, overrides: list[str]) -> float:
    from rich.console import Console

    from routerlab.training.evaluate import evaluate

    result = evaluate(cfg)
    console, metrics = Console(), result["metrics"]
    if "test_time" in result:
        _print_both(console, metrics, result["seconds"], result["test_time"])
        metrics = result["test_time"]["metrics"]
    else:
        _print(console, metrics)
    console.print(f"{result['checkpoint']}\n{result['file']}", soft_wrap=True, highlight=False)
    return metrics.get("val/bits_per_byte", metrics["val/loss"])


def _print(console: Any, metrics: dict[str, float]) -> None:
    from routerlab.training.task_results import accuracies, interval

    if "val/accuracy" in metrics:
        found = accuracies(metrics)
        for name, value in {"accuracy": found, **found["by_task"]}.items():
            console.print(f"{name:<40}{interval(value)}", highlight=False)
    for key, value in metrics.items():
        if "/layers." not in key:
            console.print(f"{key:<40}{value:.4f}", highlight=False)


def _print_both(
    console: Any, plain: dict[str, float], seconds: float, changed: dict[str, Any]
) -> None:
    """The metrics without and with changed routing, and what the change costs."""
    from rich.table import Table

    name = changed["plug_in"]["_target_"].rsplit(".", 1)[-1]
    title = f"{name} (uses the answer: a bound, no result)" if changed["uses_answer"] else name
    table = Table("", title=title, title_justify="left")
    for column in ("without", "with", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in _rows(plain, changed["metrics"]):
        table.add_row(*row)
    console.print(table)
    cost, ratio = changed["cost"], changed["seconds"] / seconds
    console.print(
        f"cost: {cost['forward_passes']:,} extra forward and {cost['backward_passes']:,} backward "
        f"passes, {cost['tokens']:,} tokens, {cost['seconds']:.1f} s; the evaluation took "
        f"{changed['seconds']:.1f} s instead of {seconds:.1f} s ({ratio:.2f}x)",
        highlight=False,
    )
    if changed["preparation_seconds"] >= 1:
        console.print(f"prepared in {changed['preparation_seconds']:.1f} s", highlight=False)


def _rows(plain: dict[str, float], changed: dict[str, float]) -> list[tuple[str, ...]]:
    """Accuracies with their intervals, then losses; what is about routers is in the file."""
    from routerlab.training.task_results import accuracies, interval

    rows = []
    if "val/accuracy" in plain:
        before, after = accuracies(plain), accuracies(changed)
        pairs = {"accuracy": (before, after)}
        if len(before["by_task"]) > 1:
            pairs |= {n: (row, after["by_task"][n]) for n, row in before["by_task"].items()}
        for name, pair in pairs.items():
            gain = 100 * (pair[1]["accuracy"] - pair[0]["accuracy"])
            rows.append((name, *map(interval, pair), f"{gain:+.1f}"))
    keys = [k for k in plain if k.startswith(("val/loss", "val/bits_per_byte"))]
    values = {key: (plain[key], changed[key]) for key in keys}
    loss = values["val/loss"]
    values["perplexity"] = (math.exp(loss[0]), math.exp(loss[1]))
    for key, (one, other) in values.items():
        rows.append((key, f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}"))
    return rows
