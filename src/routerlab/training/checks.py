"""What can be known to be wrong before any training starts."""

from typing import Any

import torch
from omegaconf import DictConfig

from routerlab.core.config import ConfigError, available
from routerlab.core.identity import PLACES, flat, within
from routerlab.core.instantiate import locate
from routerlab.objectives.finetune import FineTune
from routerlab.training.build import takes_adapter

# Changing these does not change what a run computes, so a resumed run may.
_FREE_TO_CHANGE = (*PLACES, "baselines", "evaluate_base", "trainer.max_steps")


def check_trainer(cfg: DictConfig) -> None:
    """Refuses a device that this machine does not have, and steps that make no sense."""
    if cfg.trainer.max_steps < 1:
        raise ConfigError(f"trainer.max_steps={cfg.trainer.max_steps}: must be at least 1")
    if cfg.trace_sequences < 0:
        raise ConfigError(f"trace_sequences={cfg.trace_sequences}: must be 0 or more")
    if not isinstance(wanted := cfg.get("trace_validations", False), bool):
        raise ConfigError(f"trace_validations={wanted}: must be true or false")
    if "accumulate_grad_batches" in cfg.trainer:
        raise ConfigError(
            "trainer.accumulate_grad_batches: a batch is one optimizer step here; cut it with "
            "objective.micro_batches"
        )
    wanted, devices = cfg.trainer.accelerator, cfg.trainer.devices
    gpus = torch.cuda.device_count()
    if wanted in ("gpu", "cuda") and not gpus:
        raise ConfigError(
            f"trainer.accelerator={wanted}: this machine has no CUDA device; use cpu or auto"
        )
    if wanted in ("gpu", "cuda") and isinstance(devices, int) and devices > gpus:
        raise ConfigError(f"trainer.devices={devices}: this machine has {gpus} CUDA devices")
    if wanted == "mps":
        raise ConfigError("trainer.accelerator=mps: Metal has no float64, which sums need; use cpu")
    if isinstance(devices, int) and devices < 1:
        raise ConfigError(f"trainer.devices={devices}: must be at least 1")
    if str(cfg.trainer.precision) in ("bf16-true", "16-true"):
        raise ConfigError(
            f"trainer.precision={cfg.trainer.precision}: routers, biases and prices must stay in "
            "float32; use bf16-mixed"
        )
    if str(cfg.trainer.precision).startswith("16"):
        raise ConfigError(
            f"trainer.precision={cfg.trainer.precision}: its loss scale would distort the gradient "
            "norm; use bf16-mixed"
        )
    every = cfg.trainer.val_check_interval
    if not isinstance(every, int) or every < 1:
        raise ConfigError(f"trainer.val_check_interval={every}: must be a whole number of steps")


def check_kind(cfg: DictConfig, has_tasks: bool) -> None:
    """Refuses data, objective and backbone that do not speak of the same thing."""
    takes_adapter(cfg)  # refuses an adapter that is none of the backbone's business
    pretrained, target = "path" in cfg.backbone, locate(cfg.objective["_target_"])
    if has_tasks and not issubclass(target, FineTune):
        raise ConfigError(
            f"objective {target.__name__}: the data are prompts and answers; use objective=finetune"
        )
    if not has_tasks and issubclass(target, FineTune):
        raise ConfigError(
            f"data: objective {target.__name__} needs prompts and answers; use data=sarcasm or "
            "data=jsonl"
        )
    if not has_tasks and pretrained and cfg.data.tokenizer == "bytes":
        raise ConfigError(
            "data.tokenizer=bytes: a pretrained model reads its own tokens; give its tokenizer's "
            "JSON file, or use task data"
        )
    if has_tasks and not pretrained and cfg.data.get("tokenizer") is None:
        raise ConfigError("data.tokenizer: must be given, since this backbone brings none")


def check_fit(cfg: DictConfig, vocab_size: int, backbone: Any) -> None:
    """Refuses data that the backbone cannot read: too long, or with too many symbols."""
    key = "seq_len" if "seq_len" in cfg.data else "max_length"
    positions, symbols = backbone.max_positions, backbone.vocab_size
    if positions is not None and cfg.data[key] > positions:
        raise ConfigError(
            f"data.{key}={cfg.data[key]}: longer than backbone.max_positions={positions}"
        )
    if vocab_size > symbols:
        raise ConfigError(
            f"backbone.vocab_size={symbols}: the tokenizer {cfg.data.tokenizer!r} has "
            f"{vocab_size} symbols; set backbone.vocab_size={vocab_size} or more"
        )


def check_choices(objective: Any, data: Any) -> None:
    """Refuses to judge options by their first tokens where these do not tell them apart, and
    held-out items that have one row each where options are judged otherwise.
    """
    needs = objective.needs_choices
    if needs and data.why_no_choices is not None:
        raise ConfigError(f"objective.{needs[0]}: {data.why_no_choices}")
    if data.val_rows == "answer" and objective.option_score != "first_token":
        raise ConfigError(
            f"data.val_rows=answer: objective.option_score={objective.option_score} compares the "
            "rows of all options; use objective.option_score=first_token, or data.val_rows=options"
        )


def check_trainable(cfg: DictConfig, backbone: Any) -> None:
    """Refuses to train a model whose parameters are all frozen."""
    if any(parameter.requires_grad for parameter in backbone.parameters()):
        return
    if takes_adapter(cfg):
        raise ConfigError(
            "adapter: trainable parameters: none, since the base model is frozen; choose one of "
            f"adapter={', '.join(available('adapter'))}"
        )
    raise ConfigError(
        f"backbone.trainable={cfg.backbone.get('trainable')}: no parameter learns; use "
        "backbone.trainable=all, moe, experts, or routers where the router has parameters"
    )


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Lines ``key: old -> new`` for keys that change what a run computes."""
    old, new = flat(before), flat(after)
    keys = [k for k in sorted(old.keys() | new.keys()) if not within(k, _FREE_TO_CHANGE)]
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in keys
        if old.get(key, absent) != new.get(key, absent)
    ]
