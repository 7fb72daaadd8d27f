"""What can be known to be wrong before any training starts."""

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig

from routerlab.core.config import ConfigError, available
from routerlab.core.identity import PLACES, flat, within
from routerlab.core.instantiate import locate
from routerlab.objectives.finetune import FineTune
from routerlab.objectives.routed import RoutedObjective
from routerlab.training.build import takes_adapter
from routerlab.training.parallel import FullySharded

_STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")  # that lightning knows by name
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
    on_gpu = wanted in ("gpu", "cuda") or (wanted == "auto" and gpus > 0)
    if wanted in ("gpu", "cuda") and not gpus:
        raise ConfigError(
            f"trainer.accelerator={wanted}: this machine has no CUDA device; use cpu or auto"
        )
    if on_gpu and isinstance(devices, int) and devices > gpus:
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


def num_processes(cfg: DictConfig) -> int:
    """Processes that train a run; ``trainer.devices=auto`` is every GPU, or one process."""
    devices, wanted = cfg.trainer.devices, cfg.trainer.accelerator
    if isinstance(devices, int):
        count = devices
    elif str(devices) in ("auto", "-1"):
        count = max(1, torch.cuda.device_count()) if wanted in ("auto", "gpu", "cuda") else 1
    else:
        count = len(devices.split(",") if isinstance(devices, str) else devices)
    return count * cfg.trainer.get("num_nodes", 1)


def check_strategy(cfg: DictConfig, objective: RoutedObjective) -> None:
    """Refuses a strategy that this machine cannot run, or that cannot train this model."""
    strategy, processes = cfg.trainer.get("strategy", "auto"), num_processes(cfg)
    node = strategy if isinstance(strategy, DictConfig) else None
    target = None if node is None else locate(node["_target_"])
    shards = target is FullySharded
    if node is None and strategy not in _STRATEGIES:
        older = " (which would be FSDP1)" if strategy == "fsdp" else ""
        raise ConfigError(
            f"trainer.strategy={strategy}{older}: must be one of {', '.join(_STRATEGIES)}; or "
            "choose trainer=ddp or trainer=fsdp"
        )
    if node is not None and target not in (DDPStrategy, FullySharded):
        raise ConfigError(
            f"trainer.strategy={node['_target_']}: must be lightning's DDPStrategy, or that of "
            "trainer=fsdp"
        )
    if processes == 1 and strategy != "auto" and cfg.trainer.devices == "auto":
        raise ConfigError(
            "trainer.devices=auto: there are no GPUs to share the work; say how many processes, "
            "such as trainer.devices=2"
        )
    on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    if node is not None and node.get("process_group_backend") == "nccl" and not on_gpu:
        raise ConfigError(
            "trainer.strategy.process_group_backend=nccl: needs CUDA devices; leave it out"
        )
    if shards and (reason := objective.why_not_shardable()):
        raise ConfigError(f"trainer=fsdp: {reason}; or use trainer=ddp")
    backbone: Any = objective.backbone
    for layer in backbone.moe_layers.values():
        dispatch: Any = getattr(layer, "dispatch", None)
        if processes == 1 or not hasattr(dispatch, "shard"):
            continue
        if not shards:
            raise ConfigError(
                f"dispatch: {type(dispatch).__name__} has its experts on different processes, "
                f"which trainer.strategy={strategy} does not know; use trainer=fsdp"
            )
        size = getattr(dispatch, "size", None) or processes
        if processes % size or layer.experts.num_experts % size:
            raise ConfigError(
                f"dispatch.size={size}: must divide the {processes} processes and "
                f"num_experts={layer.experts.num_experts}"
            )


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
