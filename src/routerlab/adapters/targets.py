"""Which modules of a base model are adapted, and whether it is the right base model."""

import copy
import math
import re
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from routerlab.adapters.config import MixtureOfLoraConfig
from routerlab.adapters.feed_forward import linears_of
from routerlab.adapters.layer import MixtureLayer
from routerlab.core.config import nearest


def layer_name(key: str) -> str:
    """``model.layers.3.mlp.up_proj`` as ``layers.03.mlp.up_proj``."""
    found = re.search(r"(\w+)\.(\d+)(?:\.(.*))?$", key)
    if found is None:
        return key
    rest = f".{found[3]}" if found[3] else ""
    return f"{found[1]}.{int(found[2]):02d}{rest}"


def widths_of(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear, in either of the layouts of transformers."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):
        return weight.shape[0], weight.shape[1]
    return None


def find_targets(model: nn.Module, config: MixtureOfLoraConfig) -> set[str]:
    """The keys of the modules that get a mixture. Refuses, before anything is changed, targets that
    match nothing, that overlap or that are not of the right kind.
    """
    modules = {
        key: module.base_layer if isinstance(module, MixtureLayer) else module
        for key, module in model.named_modules()
        if ".base_layer" not in key and ".mix_" not in key
    }
    if config.target_modules is None:
        config.target_modules = _default_targets(modules, config.experts)
    matched = {key for key in modules if key and _matches(config, config.target_modules, key)}
    plain = {
        key for key in modules if key and config.plain_modules
        and _matches(config, set(config.plain_modules), key)
    }  # fmt: skip
    _check_all_match(config, modules, matched)
    layers = {key: m for key, m in model.named_modules() if isinstance(m, MixtureLayer)}
    for key in sorted(matched | plain):
        inside = (k for k in matched | plain | set(layers) if k.startswith(f"{key}."))
        other = min(inside, default=None)
        if other or (key in matched and key in plain):
            raise ValueError(
                f"target_modules: {key!r} and {other or key!r} overlap; adapt one of them"
            )
        form = "lora" if key in plain and config.experts == "feed_forward" else config.experts
        if key in layers and form not in layers[key].forms:
            raise ValueError(
                f"experts={config.experts!r}: {key!r} already has an adapter of another kind "
                f"({' or '.join(layers[key].forms)}); load this one on a base model of its own"
            )
        whole = config.experts == "feed_forward" and key in matched
        if whole and linears_of(modules[key], whole=True) is None:
            raise ValueError(
                f"target_modules: {key!r} ({type(modules[key]).__name__}) is not a feed-forward "
                "network that experts='feed_forward' knows (gate_proj/up_proj/down_proj, fc1/fc2, "
                "c_fc/c_proj, dense_h_to_4h/dense_4h_to_h)"
            )
        if not whole and widths_of(modules[key]) is None:
            raise ValueError(
                f"target_modules: {key!r} is a {type(modules[key]).__name__}, not a linear"
            )
    return matched


def _matches(config: MixtureOfLoraConfig, targets: Any, key: str) -> bool:
    probe = copy.copy(config)
    probe.target_modules = targets
    return bool(check_target_module_exists(probe, key))


def _check_all_match(
    config: MixtureOfLoraConfig, modules: dict[str, nn.Module], matched: set[str]
) -> None:
    """Every name that was given must match something."""
    names = {key.rpartition(".")[2] for key in modules if key}
    given = config.target_modules
    for name in [given] if isinstance(given, str) else sorted(given):
        alone = name if isinstance(given, str) else {name}
        if not any(_matches(config, alone, key) for key in matched):
            where = ""
            if config.layers_to_transform is not None:
                where = f" in layers_to_transform={config.layers_to_transform}"
            raise ValueError(
                f"target_modules: {name!r} matches no module of the base model{where}; "
                f"{nearest(str(name), names)}"
            )
    for name in config.plain_modules or []:
        if not any(_matches(config, {name}, key) for key in modules if key):
            raise ValueError(
                f"plain_modules: {name!r} matches no module of the base model; "
                f"{nearest(name, names)}"
            )


def _default_targets(modules: dict[str, nn.Module], form: str) -> set[str]:
    """The feed-forward networks, or their linears, by their short names."""
    whole = form == "feed_forward"
    found: set[str] = set()
    wanted: set[str] = set()
    for key, module in modules.items():
        if key and (names := linears_of(module, whole)) is not None:
            wanted |= {key} if whole else {f"{key}.{n}" for n in names if n is not None}
    for key in wanted:  # "c_proj", but "mlp.c_proj" where attention has a c_proj too
        parent, _, last = key.rpartition(".")
        also = any(k.rpartition(".")[2] == last and k not in wanted for k in modules)
        found.add(f"{parent.rpartition('.')[2]}.{last}" if also else last)
    if not found:
        raise ValueError(
            "target_modules: no feed-forward network was recognised in the base model; name the "
            "modules to adapt"
        )
    return found


def facts_of(model: nn.Module) -> dict[str, Any]:
    """What tells one base model from another: kind, sizes, some entries of the embedding."""
    config = getattr(model, "config", None)
    facts: dict[str, Any] = {"class": type(model).__name__}
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if value is not None:
            facts[name] = value
    get: Any = getattr(model, "get_input_embeddings", None)
    embedding = None if get is None else get()
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, torch.Tensor) and not weight.is_meta:
        rows, columns = (torch.arange(16) * size // 16 for size in weight.shape)
        sample = weight.detach()[rows.to(weight.device), columns.to(weight.device)]
        facts["embedding"] = [round(float(entry), 6) for entry in sample]
    return facts


def check_base(model: nn.Module, config: MixtureOfLoraConfig) -> None:
    """Refuses a base model other than the one that a saved adapter was trained on."""
    if config.base_model is None:
        return
    mine = facts_of(model)
    for name, was in sorted(config.base_model.items(), key=lambda fact: fact[0] == "embedding"):
        now = mine.get(name, was)
        if name == "embedding":
            gap = math.dist(was, now) / max(math.hypot(*was), 1e-12)
            if gap > 0.1:  # rounding to bf16 makes 0.002, another initialisation 1.4
                raise ValueError(
                    "base model: the adapter was trained on one of these sizes with another "
                    f"embedding (entries differ by {gap:.0%}); load it on the base model that it "
                    "belongs to"
                )
        elif was != now:
            raise ValueError(
                f"base model: the adapter was trained on one with {name}={was}, this one has "
                f"{name}={now}; load it on the base model that it belongs to"
            )
