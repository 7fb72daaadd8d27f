"""A run's held-out data once more under changed routing, and what the change costs."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from routerlab.analysis.neighbour_bank import NeighbourBank, differences, weights_digest
from routerlab.backbones.sentence_embedder import NAME, SentenceEmbedder
from routerlab.core.config import ConfigError
from routerlab.core.instantiate import build
from routerlab.core.layers import pick_layers
from routerlab.data.continuations import Continuations
from routerlab.ops.routing_vectors import routing_vectors
from routerlab.test_time.c3po import NeighbourMixing
from routerlab.test_time.plug_in import TestTime
from routerlab.training import assemble
from routerlab.training.processes import is_main_process
from routerlab.training.run_directory import RunDirectory

BANK = "c3po_bank.safetensors"  # in the run's directory


def plug_in_of(cfg: DictConfig) -> TestTime | None:
    """The plug-in of ``cfg.test_time``, None for null."""
    return build(cfg.test_time) if cfg.get("test_time") else None


def with_prompts(cfg: DictConfig, data: Any, trainer: Any) -> dict[str, Any]:
    """What to validate on, as arguments of the trainer: prompts and what follows them."""
    if assemble.has_tasks(data):
        return {"datamodule": data}
    data.trainer = trainer  # which knows the number of this process
    return {"dataloaders": Continuations(data, cfg.prompt_share)}


def validate_rerouted(
    cfg: DictConfig,
    plug_in: TestTime,
    run: RunDirectory,
    objective: Any,
    data: Any,
    validate: Callable[[], float],
) -> dict[str, Any]:
    """The metrics under ``plug_in``, beside its cost: ``validate`` fills
    ``objective.validation_result`` and tells its seconds.
    """
    start = time.perf_counter()
    try:
        if isinstance(plug_in, NeighbourMixing):
            _give_bank(plug_in, run, objective, data)
        prepared = time.perf_counter() - start
        objective.test_time = plug_in
        seconds = validate()
    finally:
        objective.test_time = None
    metrics, distributions = objective.validation_result
    return {
        "plug_in": OmegaConf.to_container(cfg.test_time, resolve=True),
        "uses_answer": plug_in.uses_answer,
        "metrics": metrics,
        "distributions": distributions,
        "seconds": seconds,
        "preparation_seconds": prepared,
        "cost": asdict(plug_in.cost),
    }


def _give_bank(plug_in: NeighbourMixing, run: RunDirectory, objective: Any, data: Any) -> None:
    """The bank of the plug-in's file, or of the run's model and training items."""
    if not assemble.has_tasks(data):
        raise ConfigError(
            "test_time=c3po: follows prompts that were answered rightly; this run's data are "
            "running text, which has no answers"
        )
    own = run.config
    embedder = SentenceEmbedder(own.paths.cache_dir, own.get("embedder") or NAME)
    if plug_in.bank_file is None:
        bank = _own_bank(plug_in, run, objective, data, embedder)
    else:
        bank = NeighbourBank.load(Path(plug_in.bank_file).expanduser())
        # Samples of other data, or of another split of these, may be among the held-out items.
        of = bank.fingerprint
        found = {"embedder": of.get("embedder"), "tasks": of.get("data", {}).get("tasks")}
        wanted = {"embedder": embedder.identity, "tasks": data.identity["tasks"]}
        if differ := differences(found, wanted):
            raise ConfigError(f"test_time.bank={plug_in.bank_file!r}: was made from other {differ}")
    plug_in.use_bank(bank, embedder)


def _own_bank(
    plug_in: NeighbourMixing,
    run: RunDirectory,
    objective: Any,
    data: Any,
    embedder: SentenceEmbedder,
) -> NeighbourBank:
    """The bank in the run's directory, made anew unless it is of this very model and data."""
    backbone = objective.backbone
    names = pick_layers(backbone.layer_names, plug_in.layers, "layers")
    layers = {name: backbone.moe_layers[name].router.num_experts for name in names}
    fingerprint = {
        "data": data.identity,
        "embedder": embedder.identity,
        "model": weights_digest(backbone),
        "layers": layers,
        "token": plug_in.token,
        "right_by": objective.option_score,
    }
    file = run.path / BANK
    if file.is_file():
        with suppress(ValueError):  # it is of another checkpoint, or of other layers
            return NeighbourBank.load(file, fingerprint)

    def observe(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        batch = {key: value.to(objective.device) for key, value in batch.items()}
        context = objective.context(batch, 0, 0)
        out = objective.run(batch, context)
        vectors = routing_vectors(out.router_outputs, names, context, plug_in.token)
        return vectors, objective.correct(out.logits, batch)

    objective.eval()
    prompts = [item.prompt for items in data.items("train").values() for item in items]
    bank = NeighbourBank.build(
        observe,
        data.each_train_item(),
        embedder(prompts),
        layers=layers,
        token=plug_in.token,
        fingerprint=fingerprint,
    )
    if is_main_process():
        bank.save(file)
    return bank


def timed(validate: Callable[[], Any]) -> float:
    """The seconds that a validation takes; on a GPU with all that it was asked to do."""
    start = time.perf_counter()
    validate()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
