"""What a config computes, told apart from where it runs and where it writes."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Where a run computes and what it keeps. Two configs that differ in nothing else are the same
# experiment.
PLACES = (
    "resume", "run_dir", "name", "group", "paths", "callback", "logger", "launcher", "resources",
    "data.cache_dir", "data.num_workers", "backbone.cache_dir", "trainer.accelerator",
    "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trace_sequences",
    "trace_validations",
)  # fmt: skip


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as one level of dotted keys; lists are values."""
    if not isinstance(node, Mapping):
        return {prefix.removesuffix("."): node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}{key}.").items()}


def within(key: str, places: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of ``places`` or lies below one."""
    return any(key == place or key.startswith(f"{place}.") for place in places)


def scientific(config: Mapping[Any, Any]) -> dict[str, Any]:
    """The flat config without `PLACES`: what decides on the numbers of a run."""
    return {k: v for k, v in flat(config).items() if not within(k, PLACES)}


def identity(cfg: DictConfig) -> str:
    """Ten hexadecimal digits that two runs share if and only if they are the same experiment with
    the same seed: a hash of the resolved `scientific` config.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    text = json.dumps(scientific(plain), sort_keys=True, default=str)
    return hashlib.sha1(text.encode()).hexdigest()[:10]
