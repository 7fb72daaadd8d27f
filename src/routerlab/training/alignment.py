"""Routing alignment around a run: its bank of neighbours before, and what came of it after."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from torch import Tensor

from routerlab.analysis.neighbour_bank import NeighbourBank
from routerlab.backbones.sentence_embedder import SentenceEmbedder
from routerlab.core.config import ConfigError
from routerlab.objectives.routing_alignment import RoutingAlignment, measured
from routerlab.training.processes import is_main_process
from routerlab.training.run_directory import RunDirectory

FILE = "neighbour_bank.safetensors"


def check(cfg: DictConfig, objective: Any) -> None:
    """Refuses an embedder or a bank that cannot be read, and a loss that no bank will be given."""
    if not isinstance(objective, RoutingAlignment):
        for name, loss in objective.losses.by_name.items():
            if hasattr(loss, "use_bank"):
                raise ConfigError(
                    f"loss.{name}: needs a bank of neighbours, which objective=routing_alignment "
                    "makes; use that"
                )
        return
    _embedder(cfg)
    if cfg.get("bank"):
        NeighbourBank.load(cfg.bank)


def prepare(
    cfg: DictConfig, run: RunDirectory, data: Any, objective: Any, device: torch.device
) -> None:
    """Gives an objective that aligns routing its bank: that in the file ``cfg.bank``, that of a
    resumed run, or a new one, which the run keeps. Each process makes the same.

    Raises ValueError, naming what differs, for a bank of other data, layers or weights than those
    that ``objective`` begins with.
    """
    if not isinstance(objective, RoutingAlignment):
        return
    objective.to(device)
    embedder = _embedder(cfg)
    fingerprint = objective.fingerprint(data.identity, embedder.identity)
    path = cfg.get("bank") or run.path / FILE
    if cfg.get("bank") or (run.path / FILE).is_file():
        bank, how = NeighbourBank.load(path, fingerprint), f"read from {path}"
    else:
        started = time.perf_counter()
        prompts = [item.prompt for items in data.items("train").values() for item in items]
        _say(f"neighbour bank: embedding {len(prompts):,} prompts")
        embeddings = embedder(prompts)
        bank = objective.build_bank(_each_item(data, "neighbour bank"), embeddings, fingerprint)
        how = f"made in {time.perf_counter() - started:.0f} s"
        if is_main_process():
            bank.save(path)
    objective.use_bank(bank)
    share = f"{bank.num_correct:,} of {len(bank.correct):,} samples answered rightly"
    _say(f"neighbour bank: {share}, {how}")


def outcome(data: Any, objective: Any, device: torch.device) -> dict[str, Any]:
    """What ``summary.json`` has under ``alignment``: how the samples of the bank were routed
    ``before`` the first step and ``after`` the last (`RoutingAlignment.measure`); nothing for an
    objective without a bank.
    """
    if not isinstance(objective, RoutingAlignment) or objective.bank is None:
        return {}
    objective.to(device)
    bank = objective.bank
    found = {"samples": len(bank.correct), "successful": bank.num_correct}
    after = objective.measure(_each_item(data, "routing after training"))
    return {"alignment": found | {"before": measured(bank), "after": after}}


def _embedder(cfg: DictConfig) -> SentenceEmbedder:
    return SentenceEmbedder(cfg.paths.cache_dir, cfg.get("embedder"))


def _each_item(data: Any, what: str) -> Iterable[dict[str, Tensor]]:
    console, batches = Console(), data.each_train_item()
    quiet = not (console.is_terminal and is_main_process())
    return track(batches, what, len(batches), console=console, transient=True, disable=quiet)


def _say(text: str) -> None:
    if is_main_process():
        Console().print(text, highlight=False, soft_wrap=True)
