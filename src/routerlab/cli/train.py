"""``routerlab train``: hydra overrides in, a run directory out; or a sweep of many."""

from collections.abc import Sequence
from typing import Any

from routerlab.cli.hydra_app import run
from routerlab.training.preemption import noticed

_ONE_RUN = "hydra.mode=RUN"  # told to the processes of a run, whose words may name a launcher
_MANY_RUNS = "hydra.mode=MULTIRUN"  # which a sweep refuses, with what to say instead
_SWEEP = {"-m", "--multirun", "--dry-run", "--trials", "--search", "--metric"}
_SHOWN = {"--cfg", "-c", "--info", "-i"}  # hydra shows the config of one run


def main(argv: Sequence[str]) -> int:
    """Trains one run and prints its headline; many runs, or one on SLURM, as a sweep."""
    if _is_sweep(argv):
        from routerlab.sweeps.command import main as sweep

        return sweep(argv)
    with noticed():  # a signal can come while all else is still being imported
        run("train", "train", argv, _train)
    return 0


def _is_sweep(words: Sequence[str]) -> bool:
    if _ONE_RUN in words:
        return False
    flags = {word.split("=", 1)[0] for word in words if word.startswith("-")}
    if flags & _SWEEP:
        return True
    named = any(word.startswith(("launcher=slurm", "sweep=", _MANY_RUNS)) for word in words)
    return named and not flags & _SHOWN


def _train(cfg: Any, overrides: list[str]) -> None:
    if "wandb" in (cfg.get("logger") or {}):
        # It looks through all modules many times when it starts: a second less while they are few.
        import wandb.apis.public  # noqa: F401

    from routerlab.training.processes import is_main_process
    from routerlab.training.summary import print_headline
    from routerlab.training.train import train

    finished = train(cfg, overrides)
    if is_main_process():
        print_headline(finished)
