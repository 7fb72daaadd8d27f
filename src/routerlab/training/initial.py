"""Weights that a run starts from: those that another run ended with."""

from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from routerlab.core.config import ConfigError
from routerlab.training.run_directory import RunDirectory

PRETRAIN = "pretrain"  # the directory, inside a run's, of the run that it starts from
_BACKBONE = "backbone."  # before the names of an objective's weights


def started(cfg: DictConfig, run: RunDirectory) -> DictConfig:
    """The config by which the model of ``run`` is built: ``init_from`` is its own pretraining, if
    ``cfg`` asks for one.
    """
    if not cfg.get("pretrain"):
        return cfg
    found = cfg.copy()
    OmegaConf.update(found, "init_from", str(run.path / PRETRAIN), force_add=True)
    return found


@torch.no_grad()
def start_from(backbone: nn.Module, directory: str | Path) -> None:
    """Copies the weights that the run in ``directory`` ended with into ``backbone``; first those
    that it started from itself. A run that trained a part of its model knows that part alone: the
    rest of ``backbone`` stays as it is.

    Raises `ConfigError` if there is no run or no checkpoint, or if ``backbone`` has no tensor of a
    weight's name and shape.
    """
    path = Path(directory).expanduser()
    if not (path / "config.yaml").is_file():
        what = "holds no run (it has no config.yaml)" if path.is_dir() else "no such directory"
        raise ConfigError(f"init_from={str(directory)!r}: {what}")
    run = RunDirectory.existing(path)
    if before := started(run.config, run).get("init_from"):
        start_from(backbone, before)
    checkpoint, _ = run.newest_checkpoint()
    if checkpoint is None:
        raise ConfigError(f"init_from={str(directory)!r}: that run has no checkpoint yet")
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    weights = {k.removeprefix(_BACKBONE): v for k, v in saved.items() if k.startswith(_BACKBONE)}
    check_fit(f"init_from={str(directory)!r}", weights, backbone)
    own = _tensors(backbone)
    for name, value in weights.items():
        own[name].copy_(value)


def check_fit(field: str, weights: Mapping[str, Tensor], backbone: nn.Module) -> None:
    """Refuses weights that ``backbone`` has no tensor of the same name and shape for."""
    own = _tensors(backbone)
    foreign = [name for name in weights if name not in own]
    other = [n for n in weights if n in own and own[n].shape != weights[n].shape]
    if foreign:
        raise ConfigError(
            f"{field}: this model has no {', '.join(foreign[:3])} ({len(foreign)} of "
            f"{len(weights)} weights of that run); it must be built like the model there"
        )
    if other:
        name = other[0]
        raise ConfigError(
            f"{field}: {name} is {list(weights[name].shape)} there and {list(own[name].shape)} in "
            f"this model ({len(other)} of {len(weights)} weights differ in shape)"
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All of them, frozen ones too, which its ``state_dict`` may leave out."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}
