"""``routerlab eval``: the newest checkpoint of a run on held-out text."""

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
    console = Console()
    for key, value in result["metrics"].items():
        if "/layers." not in key:
            console.print(f"{key:<40}{value:.4f}", highlight=False)
    console.print(f"{result['checkpoint']}\n{result['file']}", soft_wrap=True, highlight=False)
    return result["metrics"]["val/bits_per_byte"]
