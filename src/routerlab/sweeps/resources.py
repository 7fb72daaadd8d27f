"""What a job of a cluster gets: the config group ``resources`` as options of sbatch."""

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from routerlab.core.config import ConfigError, available, nearest

_LEAST = {
    "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0, "cpus_per_task": 1, "memory_gib": 1,
    "minutes": 1, "signal_seconds": 1,
}  # fmt: skip
_NAMES = ("partition", "account")
_KEYS = {*_LEAST, *_NAMES, "extra"}
# Options of sbatch that have a key of their own, and those that are ours.
_OWN = {
    "nodes": "nodes", "ntasks-per-node": "tasks_per_node", "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_task", "mem": "memory_gib", "time": "minutes",
    "partition": "partition", "account": "account", "signal": "signal_seconds",
    "array": None, "output": None, "error": None, "open-mode": None, "job-name": None,
    "requeue": None, "no-requeue": None, "chdir": None,
}  # fmt: skip
_OPTION = re.compile(r"[a-z][a-z-]*")
_MARGIN = 60  # seconds; SLURM looks at time limits about once a minute


def sbatch_options(cfg: DictConfig) -> dict[str, Any]:
    """``cfg.resources`` as parameters of submitit's SlurmExecutor.

    Raises `ConfigError`, naming the key, for values that make no sense, alone or with ``trainer``.
    """
    if cfg.get("resources") is None:
        raise ConfigError(f"resources: not chosen; {nearest('', available('resources'))}")
    said: Any = OmegaConf.to_container(cfg.resources, resolve=True)
    if missing := sorted(_KEYS - said.keys()):
        raise ConfigError(f"resources.{missing[0]}: missing")
    for key in said.keys() - _KEYS:
        raise ConfigError(f"resources.{key}: no such key; {nearest(key, _KEYS)}")
    _check_values(said)
    _check_processes(cfg, said)
    more = {"requeue": True, "chdir": str(Path.cwd()), **_extra(said["extra"])}
    options: dict[str, Any] = {
        "nodes": said["nodes"],
        "ntasks_per_node": said["tasks_per_node"],
        "gpus_per_node": said["gpus_per_node"] or None,
        "cpus_per_task": said["cpus_per_task"],
        "mem": None if said["memory_gib"] is None else f"{said['memory_gib']}G",
        "time": said["minutes"],
        "partition": said["partition"],
        "account": said["account"],
        "signal_delay_s": said["signal_seconds"],
        # A step does not inherit its cores from the job; one dead process must end the others.
        "srun_args": [f"--cpus-per-task={said['cpus_per_task']}", "--kill-on-bad-exit=1"],
        "setup": [
            f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{said['cpus_per_task']}}}",
            "export PYTHONUNBUFFERED=1",
        ],
        "additional_parameters": more,
    }
    return {key: value for key, value in options.items() if value is not None}


def _check_values(said: dict[str, Any]) -> None:
    for key, least in _LEAST.items():
        value = said[key]
        if key == "memory_gib" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"resources.{key}={value}: must be a whole number, at least {least}")
    for key in _NAMES:
        value = said[key]
        if value is not None and (not isinstance(value, str) or re.search(r"\s", value)):
            raise ConfigError(f"resources.{key}={value!r}: must be a name, or null")
    most = 60 * said["minutes"] - _MARGIN
    if said["signal_seconds"] > most:
        raise ConfigError(
            f"resources.signal_seconds={said['signal_seconds']}: must be at most {most}, or else "
            f"resources.minutes={said['minutes']} leave no time for training"
        )


def _check_processes(cfg: DictConfig, said: dict[str, Any]) -> None:
    """A run has as many processes as SLURM starts."""
    for key, of in (("devices", "tasks_per_node"), ("num_nodes", "nodes")):
        if (value := cfg.trainer.get(key, 1)) != said[of]:
            raise ConfigError(
                f"trainer.{key}={value}: must be that of resources.{of}={said[of]}, one process "
                "for each device"
            )


def _extra(said: Any) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise ConfigError(f"resources.extra={said!r}: must be a mapping of options of sbatch")
    found = {str(key).replace("_", "-"): value for key, value in said.items()}
    for key, value in found.items():
        if not _OPTION.fullmatch(key):
            raise ConfigError(f"resources.extra.{key}: no option of sbatch")
        if key in _OWN:
            instead = f"use resources.{_OWN[key]}" if _OWN[key] else "it is set by routerlab"
            raise ConfigError(f"resources.extra.{key}: {instead}")
        if not isinstance(value, str | int | float):
            raise ConfigError(
                f"resources.extra.{key}={value!r}: must be text, a number, or true for a flag"
            )
    return {key: value for key, value in found.items() if value is not False}
