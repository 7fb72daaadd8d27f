"""``routerlab train``: hydra overrides in, a run directory out."""

from collections.abc import Sequence
from typing import Any

from routerlab.cli.hydra_app import run


def main(argv: Sequence[str]) -> int:
    """Trains each job of the command line and prints its headline."""
    run("train", "train", argv, _train)
    return 0


def _train(cfg: Any, overrides: list[str]) -> float | None:
    from routerlab.training.processes import is_main_process
    from routerlab.training.summary import print_headline
    from routerlab.training.train import train

    finished = train(cfg, overrides)
    if not is_main_process():
        return None
    print_headline(finished)
    val = finished.read_json("summary.json")["val"]
    return val.get("bits_per_byte", val["loss"])  # lower is better, whatever the task
