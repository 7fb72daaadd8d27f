"""Runs beside a run, trained before it in the same job: its pretraining, and its baselines."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from routerlab.core.config import ConfigError, compose, quoted
from routerlab.core.errors import NonFiniteLossError
from routerlab.training.checks import differences
from routerlab.training.initial import PRETRAIN
from routerlab.training.run_directory import RunDirectory

# of the main run alone
_OWN = ("run_dir", "resume", "baselines", "pretrain", "evaluate_base", "hydra")
_OF_ADAPTER = ("router", "balancer", "loss")  # what an adapter's file chooses
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")


@dataclass(frozen=True)
class Beside:
    """A run beside the main one: its directory inside that of the main run, its config, and the
    words that make it. ``after_pretraining``: it starts from the weights of the pretraining.
    """

    place: str
    cfg: DictConfig
    overrides: list[str]
    after_pretraining: bool = False

    @property
    def key(self) -> str:
        """The config's key that asks for it."""
        return self.place.replace("/", ".")

    def of(self, run: RunDirectory) -> tuple[Path, "Beside"]:
        """Its run directory beside ``run``, and itself with the weights it starts from."""
        folder = run.path / self.place
        if not self.after_pretraining:
            return folder, self
        cfg, start = self.cfg.copy(), str(run.path / PRETRAIN)
        cfg.init_from = start
        words = [*self.overrides, f"init_from={quoted(start)}"]
        return folder, replace(self, cfg=cfg, overrides=words)


def planned(cfg: DictConfig, overrides: Sequence[str]) -> list[Beside]:
    """The runs that ``cfg.pretrain`` and ``cfg.baselines`` ask for, in the order of training,
    composed from the main run's words and their own.

    Their own words win. A baseline that chooses another adapter does without the main run's words
    about the adapter, its router, balancer and losses; one that says ``init_from`` does not start
    from the pretraining. Raises `ConfigError`, naming the run, for anything that does not compose.
    """
    asked = {PRETRAIN: cfg.pretrain} if cfg.get("pretrain") else {}
    for name in cfg.get("baselines") or {}:
        if not _NAME.fullmatch(str(name)):
            raise ConfigError(f"baselines.{name}: a name has letters, digits, - and _")
        asked[f"baselines/{name}"] = cfg.baselines[name]
    plans = []
    for place, own in asked.items():
        key = place.replace("/", ".")
        if not (OmegaConf.is_list(own) and all(isinstance(word, str) for word in own)):
            raise ConfigError(f"{key}={own!r}: must be a list of overrides such as adapter=lora")
        keys = [_key(word) for word in own]
        dropped = _OWN + (_OF_ADAPTER if "adapter" in keys else ())
        kept = [word for word in overrides if not _about(word, (*dropped, *keys))]
        words = [*kept, *own, "~baselines", "pretrain=[]", "evaluate_base=false"]
        after = PRETRAIN in asked and place != PRETRAIN and "init_from" not in keys
        try:
            plans.append(Beside(place, compose(*words), words, after))
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
    return plans


def train_each(
    plans: Sequence[Beside], run: RunDirectory, train: Callable[..., RunDirectory]
) -> None:
    """Trains every run beside ``run``; goes on with one that was cut off, and leaves one alone
    that is done. One that fails ends the job with an error that names it.
    """
    for asked in plans:
        folder, plan = asked.of(run)
        cfg, words = plan.cfg.copy(), plan.overrides
        if (folder / "config.yaml").is_file():
            _check_same(plan, folder)
            if (RunDirectory(folder).read_json("status.json") or {}).get("state") == "done":
                continue
            cfg.resume, words = str(folder), [f"resume={folder}"]
        else:
            cfg.run_dir = str(folder)
        try:
            train(cfg, words)
        except (KeyboardInterrupt, SystemExit, SIGTERMException):
            raise
        except Exception as error:
            raise _named(plan.place.replace("baselines/", "baseline "), error) from error


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


def _check_same(plan: Beside, folder: Path) -> None:
    before: Any = OmegaConf.to_container(RunDirectory(folder).config, resolve=True)
    after: Any = OmegaConf.to_container(plan.cfg, resolve=True)
    if plan.after_pretraining:  # the main run may have been moved
        before["init_from"] = after["init_from"]
    if changed := differences(before, after):
        raise ConfigError(
            f"{plan.key}: {folder} holds a run of another config:\n  " + "\n  ".join(changed)
        )


def _key(word: str) -> str:
    return word.lstrip("+~").split("=", 1)[0].split("@", 1)[0]


def _about(word: str, keys: Sequence[str]) -> bool:
    return any(_key(word) == key or _key(word).startswith(f"{key}.") for key in keys)
