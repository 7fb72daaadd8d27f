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
from routerlab.training.checks import check_choices, check_fit, check_kind
from routerlab.training.initial import start_from


def has_tasks(data: Any) -> bool:
    """Whether a data module gives items of tasks (prompts and answers), and not running text."""
    return hasattr(data, "task_names")


def build_data(cfg: DictConfig) -> Any:
    """The data module, prepared and open.

    Task data without a tokenizer of their own get that of the pretrained backbone, which is loaded
    without its weights.
    """
    data = build(cfg.data)
    check_kind(cfg, has_tasks(data))
    if has_tasks(data) and cfg.data.get("tokenizer") is None:
        data.use_tokenizer(_tokenizer(cfg))
    data.prepare_data()
    data.setup()
    return data


def use_final(data: Any) -> None:
    """From now on the held-out data are those of the last evaluation of a run."""
    if has_tasks(data):
        data.use_final_items()
    else:
        data.use_final_windows()


def build_objective(cfg: DictConfig, data: Any = None) -> RoutedObjective:
    """The LightningModule of a config, for the labels and units of its data if there is any. Its
    model starts from the weights of the run ``cfg.init_from``.
    """
    backbone: Any = build_backbone(cfg)
    if cfg.get("init_from"):
        start_from(backbone, cfg.init_from)
    labels: dict[str, Any] = {}
    if data is not None and has_tasks(data):
        check_fit(cfg, data.vocab_size, backbone)
        labels = {"domains": data.task_names}
    elif data is not None:
        check_fit(cfg, data.corpus.vocab_size, backbone)
        held_out = [data.corpus.meta[unit]["val"] for unit in ("bytes", "tokens")]
        per_token = [num_bytes / tokens for num_bytes, tokens in zip(*held_out, strict=True)]
        labels = {"domains": data.corpus.domains, "bytes_per_token": per_token}
    objective: Any = build(
        cfg.objective,
        backbone=backbone,
        optimizer=build(cfg.optimizer),
        losses=build_all(cfg.get("loss")),
        diagnostics=build_all(cfg.get("diagnostic")),
        schedules={
            name: schedule
            for name, schedule in build_all(cfg.get("schedule")).items()
            if not isinstance(schedule, LayerwiseExperts)
        },
        seed=cfg.seed,
        **labels,
    )
    if data is not None and has_tasks(data):
        check_choices(objective, data)
    return objective


def _tokenizer(cfg: DictConfig) -> Any:
    """The pretrained backbone's own tokenizer."""
    from routerlab.backbones.base_models import find_base
    from routerlab.data.task_batches import load_tokenizer

    path = Path(cfg.backbone.path).expanduser()
    if "cache_dir" in cfg.backbone:  # the path may also be a name
        path = find_base(cfg.backbone.path, Path(cfg.backbone.cache_dir))
    return load_tokenizer(path)


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
    """What tells one corpus from another: domains or tasks, sources and sizes."""
    if has_tasks(data):
        return data.identity
    return {key: data.corpus.meta[key] for key in ("domains", "sources", "tokens", "bytes")}


def check_schedules(cfg: DictConfig, objective: RoutedObjective) -> None:
    """Builds what a schedule moves with each extreme value, so that its constructor refuses what it
    would refuse in a config.
    """
    backbone: Any = objective.backbone
    router = next((layer.router for layer in backbone.moe_layers.values()), None)
    sizes = {"d_model": cfg.backbone.get("d_model") or 8}  # whose value decides on no knob
    sizes["num_experts"] = getattr(router, "num_experts", 1)
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
                owner: Any = router if room == "router" else getattr(router, "balancer", None)
                part = wide[room]
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
    for key in (
        "max_val_windows", "final_val_windows", "max_val_items", "final_val_items", "val_items",
        "test_items",
    ):  # fmt: skip
        if (held_out := cfg.data.get(key)) is not None and held_out < world_size:
            raise ConfigError(f"data.{key}={held_out}: must be at least the {world_size} processes")
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
        "FSDP2-wrapped module .* returned a view tensor.*",  # that nothing changes in place
        "Using ModelCheckpoint with manual optimization.*",  # after the step is what we want
    ):
        warnings.filterwarnings("ignore", message=text)
