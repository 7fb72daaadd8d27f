"""Runs that a run is to be compared with, trained before it in the same job."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from routerlab.core.config import ConfigError, compose
from routerlab.core.errors import NonFiniteLossError
from routerlab.training.checks import differences
from routerlab.training.run_directory import RunDirectory

_OWN = ("run_dir", "resume", "baselines", "evaluate_base", "hydra")  # of the main run alone
_OF_ADAPTER = ("router", "balancer", "loss")  # what an adapter's file chooses
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")


@dataclass(frozen=True)
class Baseline:
    """A run beside the main one: its name, config, and the words that make it."""

    name: str
    cfg: DictConfig
    overrides: list[str]

    def folder(self, run: RunDirectory) -> Path:
        """Its run directory, inside that of the main run."""
        return run.path / "baselines" / self.name


def planned(cfg: DictConfig, overrides: Sequence[str]) -> list[Baseline]:
    """The runs that ``cfg.baselines`` names, composed from the main run's words and their own.

    A baseline's own words win. One that chooses another adapter does without the main run's words
    about the adapter, its router, balancer and losses. Raises `ConfigError` with the name of the
    baseline for anything that does not compose.
    """
    plans = []
    for name, own in (cfg.get("baselines") or {}).items():
        place = f"baselines.{name}"
        if not _NAME.fullmatch(str(name)):
            raise ConfigError(f"{place}: a name has letters, digits, - and _")
        if not (OmegaConf.is_list(own) and all(isinstance(word, str) for word in own)):
            raise ConfigError(f"{place}={own!r}: must be a list of overrides such as adapter=lora")
        dropped = _OWN + (_OF_ADAPTER if any(_key(word) == "adapter" for word in own) else ())
        kept = [word for word in overrides if not _about(word, (*dropped, *map(_key, own)))]
        words = [*kept, *own, "~baselines", "evaluate_base=false"]
        try:
            plans.append(Baseline(str(name), compose(*words), words))
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
    return plans


def train_each(
    plans: Sequence[Baseline], run: RunDirectory, train: Callable[..., RunDirectory]
) -> None:
    """Trains every baseline of ``run``; goes on with one that was cut off, and leaves one alone
    that is done. One that fails ends the job with an error that names it.
    """
    for plan in plans:
        folder = plan.folder(run)
        cfg, words = plan.cfg, plan.overrides
        if (folder / "config.yaml").is_file():
            _check_same(plan, folder)
            if (RunDirectory(folder).read_json("status.json") or {}).get("state") == "done":
                continue
            cfg, words = cfg.copy(), [f"resume={folder}"]
            cfg.resume = str(folder)
        else:
            cfg = cfg.copy()
            cfg.run_dir = str(folder)
        try:
            train(cfg, words)
        except (KeyboardInterrupt, SystemExit, SIGTERMException):
            raise
        except Exception as error:
            raise _named(f"baseline {plan.name}", error) from error


def results(run: RunDirectory) -> dict[str, Any]:
    """``summary.json`` of each finished baseline of ``run``, by name, in its config's order."""
    names = list(run.config.get("baselines") or {})
    found = {n: RunDirectory(run.path / "baselines" / n).read_json("summary.json") for n in names}
    return {name: summary for name, summary in found.items() if summary}


def _named(prefix: str, error: Exception) -> Exception:
    """The same kind of error for the command line, with the baseline's name in front."""
    if isinstance(error, NonFiniteLossError):
        return NonFiniteLossError(f"{prefix}: {error}")
    if isinstance(error, ValueError | OSError):
        return ConfigError(f"{prefix}: {error}")
    return RuntimeError(f"{prefix}: {type(error).__name__}: {error}")


def _check_same(plan: Baseline, folder: Path) -> None:
    before: Any = OmegaConf.to_container(RunDirectory(folder).config, resolve=True)
    after: Any = OmegaConf.to_container(plan.cfg, resolve=True)
    if changed := differences(before, after):
        raise ConfigError(
            f"baselines.{plan.name}: {folder} holds a run of another config:\n  "
            + "\n  ".join(changed)
        )


def _key(word: str) -> str:
    return word.lstrip("+~").split("=", 1)[0].split("@", 1)[0]


def _about(word: str, keys: Sequence[str]) -> bool:
    return any(_key(word) == key or _key(word).startswith(f"{key}.") for key in keys)
