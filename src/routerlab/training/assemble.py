"""A config's data, objective and trainer, put together and checked against each other."""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from routerlab.core.config import ConfigError
from routerlab.core.instantiate import build, build_all
from routerlab.objectives.routed import RoutedObjective
from routerlab.objectives.scheduled import fitting
from routerlab.routers.build import with_balancer
from routerlab.schedules.layerwise import LayerwiseExperts
from routerlab.training.build import build_backbone
from routerlab.training.checks import check_fit


def build_data(cfg: DictConfig) -> Any:
    """The data module, prepared and open."""
    data = build(cfg.data)
    data.prepare_data()
    data.setup()
    return data


def build_objective(cfg: DictConfig, data: Any = None) -> RoutedObjective:
    """The LightningModule of a config, for the labels and units of its data if there is any."""
    domains = per_token = None
    if data is not None:
        check_fit(cfg, data.corpus.vocab_size)
        domains = data.corpus.domains
        held_out = [data.corpus.meta[unit]["val"] for unit in ("bytes", "tokens")]
        per_token = [num_bytes / tokens for num_bytes, tokens in zip(*held_out, strict=True)]
    return build(
        cfg.objective,
        backbone=build_backbone(cfg),
        optimizer=build(cfg.optimizer),
        losses=build_all(cfg.get("loss")),
        diagnostics=build_all(cfg.get("diagnostic")),
        schedules={
            name: schedule
            for name, schedule in build_all(cfg.get("schedule")).items()
            if not isinstance(schedule, LayerwiseExperts)
        },
        seed=cfg.seed,
        domains=domains,
        bytes_per_token=per_token,
    )


def build_trainer(
    cfg: DictConfig, directory: Path, callbacks: list[pl.Callback], loggers: list[Logger]
) -> pl.Trainer:
    """The trainer: one endless epoch, our checkpoints, our progress, no requeue of its own."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    from routerlab.training.callbacks.checkpoint import AtomicCheckpointIO

    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))
    accelerator = cfg.trainer.accelerator
    if accelerator == "auto":  # never Metal: it has no float64, which sums need
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return build(
        cfg.trainer,
        accelerator=accelerator,
        default_root_dir=str(directory),
        callbacks=callbacks,
        logger=loggers,
        plugins=plugins,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def corpus_identity(data: Any) -> dict[str, Any]:
    """What tells one corpus from another: domains, sources and sizes."""
    return {key: data.corpus.meta[key] for key in ("domains", "sources", "tokens", "bytes")}


def check_schedules(cfg: DictConfig, objective: RoutedObjective) -> None:
    """Builds what a schedule moves with each extreme value, so that its constructor refuses what it
    would refuse in a config.
    """
    backbone: Any = objective.backbone
    router = next(iter(backbone.moe_layers.values())).router
    sizes = {"d_model": cfg.backbone.d_model, "num_experts": router.num_experts}
    for name, node in (cfg.get("schedule") or {}).items():
        schedule = build(node)
        if isinstance(schedule, LayerwiseExperts):
            continue
        room, *path, knob = schedule.target.split(".")
        for value in schedule.extremes():
            wide = cfg.copy()
            if room == "loss":
                owner, part = objective.losses.by_name[path[0]], wide.loss[path[0]]
            else:
                owner, part = (router if room == "router" else router.balancer), wide[room]
            part[knob] = fitting(value, type(owner), knob)
            try:
                build(part) if room == "loss" else with_balancer(wide)(**sizes)
            except ValueError as error:
                raise ConfigError(f"schedule.{name}: {error}") from error


def check_recipe(cfg: DictConfig, objective: RoutedObjective) -> None:
    """Makes an optimizer and a trainer once, so that what they refuse is refused before the run."""
    try:
        objective.recipe.build(objective, cfg.trainer.max_steps)
    except Exception as error:
        raise ConfigError(f"optimizer: {error}") from error
    try:
        build_trainer(cfg, Path.cwd(), [], [])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"trainer: {error}") from error


def check_batch(cfg: DictConfig, world_size: int) -> None:
    """Refuses a batch that cannot be cut as asked."""
    size, pieces = cfg.data.batch_size, cfg.objective.micro_batches
    if size % world_size:
        raise ConfigError(f"data.batch_size={size}: not a multiple of the {world_size} processes")
    for key in ("max_val_windows", "final_val_windows"):
        if (windows := cfg.data.get(key)) is not None and windows < world_size:
            raise ConfigError(f"data.{key}={windows}: must be at least the {world_size} processes")
    if pieces > size // world_size:
        raise ConfigError(
            f"objective.micro_batches={pieces}: must be at most the {size // world_size} sequences "
            "that a process has in a step (data.batch_size / processes)"
        )


def quiet() -> None:
    """Silences remarks of libraries that are of no use to our users."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        ".*srun.* command is available.*",
        ".*does not have many workers.*",
        ".*anonymous.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        "Using ModelCheckpoint with manual optimization.*",  # after the step is what we want
    ):
        warnings.filterwarnings("ignore", message=text)
