"""``routerlab eval``: the newest checkpoint of a run on held-out data."""

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
    from routerlab.training.task_results import accuracies, interval

    result = evaluate(cfg)
    console, metrics = Console(), result["metrics"]
    if "val/accuracy" in metrics:
        found = accuracies(metrics)
        for name, value in {"accuracy": found, **found["by_task"]}.items():
            console.print(f"{name:<40}{interval(value)}", highlight=False)
    for key, value in metrics.items():
        if "/layers." not in key:
            console.print(f"{key:<40}{value:.4f}", highlight=False)
    console.print(f"{result['checkpoint']}\n{result['file']}", soft_wrap=True, highlight=False)
    return metrics.get("val/bits_per_byte", metrics["val/loss"])
