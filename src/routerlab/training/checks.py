"""What can be known to be wrong before any training starts."""

from typing import Any

import torch
from omegaconf import DictConfig

from routerlab.analysis.compare import flat
from routerlab.core.config import ConfigError

# Changing these does not change what a run computes, so a resumed run may.
_FREE_TO_CHANGE = (
    "resume",
    "run_dir",
    "paths.",
    "callback.",
    "logger.",
    "trainer.max_steps",
    "data.cache_dir",
)


def check_trainer(cfg: DictConfig) -> None:
    """Refuses a device that this machine does not have, and steps that make no sense."""
    if cfg.trainer.max_steps < 1:
        raise ConfigError(f"trainer.max_steps={cfg.trainer.max_steps}: must be at least 1")
    if cfg.trace_sequences < 0:
        raise ConfigError(f"trace_sequences={cfg.trace_sequences}: must be 0 or more")
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


def check_fit(cfg: DictConfig, vocab_size: int) -> None:
    """Refuses text that the backbone cannot read: too long, or with too many symbols."""
    backbone, data = cfg.backbone, cfg.data
    if data.seq_len > backbone.max_positions:
        raise ConfigError(
            f"data.seq_len={data.seq_len}: longer than backbone.max_positions="
            f"{backbone.max_positions}"
        )
    if vocab_size > backbone.vocab_size:
        raise ConfigError(
            f"backbone.vocab_size={backbone.vocab_size}: the tokenizer {data.tokenizer!r} has "
            f"{vocab_size} symbols; set backbone.vocab_size={vocab_size} or more"
        )


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Lines ``key: old -> new`` for keys that change what a run computes."""
    old, new = flat(before), flat(after)
    keys = [k for k in sorted(old.keys() | new.keys()) if not k.startswith(_FREE_TO_CHANGE)]
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in keys
        if old.get(key, absent) != new.get(key, absent)
    ]
