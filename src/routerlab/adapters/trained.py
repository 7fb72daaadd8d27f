"""Adapters that start from trained ones: plain LoRAs as experts, and skills for a new task."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from routerlab.adapters.config import PEFT_TYPE, MixtureOfLoraConfig
from routerlab.adapters.experts import LoraExperts
from routerlab.adapters.layer import MixtureLinear, exclude

_UNSUPPORTED = (
    "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication",
    "modules_to_save",
)  # fmt: skip


def import_experts(layers: dict[str, Any], adapter: str, config: MixtureOfLoraConfig) -> None:
    """Copies the LoRAs in ``config.experts_from`` into the experts of the same number.

    Each keeps its own scale (alpha / r, or alpha / sqrt(r) for rsLoRA), folded into B: an expert
    whose weight is 1 (or omega) adds exactly what the LoRA alone would add. A linear that a LoRA
    does not adapt has no such expert: the router there leaves it out, and
    ``config.absent_experts`` says so.
    """
    sources = config.experts_from or []
    if config.experts != "lora":
        raise ValueError(f"experts_from: LoRAs become experts of 'lora', not of {config.experts!r}")
    if len(sources) != config.num_experts:
        raise ValueError(
            f"experts_from: {len(sources)} adapters for num_experts={config.num_experts} experts"
        )
    constant = 1.0 if config.omega is None else config.router["weight"]
    absent: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        factors = _lora_factors(Path(source), config.r)
        used = set()
        for name, layer in layers.items():
            experts = layer.mix_experts[adapter]
            if not isinstance(layer, MixtureLinear) or not isinstance(experts, LoraExperts):
                continue
            if experts.num_experts == 1 < config.num_experts:
                continue  # a plain LoRA beside the mixture
            key = next((k for k in factors if _same_module(k, name)), None)
            if key is None:
                absent.setdefault(name, []).append(index)
                experts.set_expert(index, *_nothing(experts))
                continue
            used.add(key)
            a, b = factors[key]
            _check_shapes(source, name, a, b, layer)
            experts.set_expert(index, a, b / constant)
        if unused := sorted(set(factors) - used):
            raise ValueError(
                f"experts_from: {source} adapts {unused[0]}, which target_modules leave out"
            )
    for name, missing in absent.items():
        if len(missing) == config.num_experts:
            raise ValueError(f"experts_from: no adapter adapts {name}; leave it out of the targets")
        if config.router_scope == "block":
            raise ValueError(
                f"router_scope='block': experts {missing} have no weights in {name}, which the "
                "router of its block cannot know; use router_scope='linear'"
            )
        exclude(layers[name].mix_router[adapter], missing, name)
    config.absent_experts = absent
    for layer in layers.values():
        if config.train_experts and isinstance(experts := layer.mix_experts[adapter], LoraExperts):
            experts.remember()


def take_over_shape(config: MixtureOfLoraConfig) -> None:
    """Gives ``config`` the sizes and targets of the skills that it adapts."""
    source = _saved_skills(config)
    config.num_experts, config.num_heads = source["num_experts"], source["num_heads"]
    config.r, config.lora_alpha = source["r"], source["lora_alpha"]
    targets = source["target_modules"]
    config.target_modules = targets if isinstance(targets, str) else set(targets)
    kept = ("use_rslora", "exclude_modules", "layers_to_transform", "layers_pattern", "base_model")
    for name in kept:
        setattr(config, name, source[name])
    config.num_tasks = config.num_tasks or 1


@torch.no_grad()
def take_over_skills(layers: dict[str, Any], adapter: str, config: MixtureOfLoraConfig) -> None:
    """Copies the inventory of ``config.adapt_from``; ``mu`` takes the means of the factors."""
    path = Path(config.adapt_from or "")
    weights = load_file(path / "adapter_model.safetensors")
    for name, layer in layers.items():
        experts = layer.mix_experts[adapter]
        for factor in ("lora_A", "lora_B"):
            key = next(
                (k for k in weights if k.endswith(f".mix_experts.{factor}")
                 and _same_module(k.removesuffix(f".mix_experts.{factor}"), name)), None,
            )  # fmt: skip
            if key is None:
                raise ValueError(f"adapt_from={str(path)!r}: has no {factor} for {name}")
            value = weights[key]  # [h S I/h r] or [h S r O/h]
            if config.adapt == "mu":
                value = value.mean(1)
                if factor == "lora_A":
                    value = value.flatten(0, 1)[None, None]
                else:
                    value = value.transpose(0, 1).flatten(1)[None, None]
            getattr(experts, factor).copy_(value)


def _saved_skills(config: MixtureOfLoraConfig) -> dict[str, Any]:
    path = Path(config.adapt_from or "") / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"adapt_from={config.adapt_from!r}: no adapter_config.json there")
    saved = json.loads(path.read_text())
    if saved.get("peft_type") != PEFT_TYPE or saved.get("experts") != "skills":
        raise ValueError(f"adapt_from={config.adapt_from!r}: not an adapter of experts='skills'")
    return saved


def _lora_factors(path: Path, r: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A [k I] and scaled B [O k] of every linear that a saved LoRA adapts, by module key."""
    file = path / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"experts_from: {str(path)!r} holds no adapter_config.json")
    saved = json.loads(file.read_text())
    if saved.get("peft_type") != "LORA":
        raise ValueError(
            f"experts_from: {str(path)!r} is a {saved.get('peft_type')}, not a plain LORA adapter"
        )
    for name in _UNSUPPORTED:
        if saved.get(name):
            raise ValueError(f"experts_from: {str(path)!r} uses {name}, which experts cannot have")
    if saved.get("bias", "none") != "none":
        raise ValueError(f"experts_from: {str(path)!r} trained biases, which experts cannot have")
    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(f"experts_from: {str(path)!r} holds no adapter_model.safetensors")
    weights = load_file(path / "adapter_model.safetensors")
    factors = {}
    for key, a in weights.items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(f"experts_from: {str(path)!r} has {key}, which experts cannot have")
        if key.endswith(".lora_B.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        b, rank = weights[f"{module}.lora_B.weight"], len(a)
        if rank > r:
            raise ValueError(f"experts_from: {str(path)!r} has rank {rank}, above r={r}")
        scale = saved["lora_alpha"] / (rank**0.5 if saved.get("use_rslora") else rank)
        factors[module] = (a.float(), scale * b.float())
    return factors


def _same_module(key: str, name: str) -> bool:
    """Whether a saved key (``base_model.model.model.layers.3.mlp.up_proj``) is of a layer."""
    plain = ".".join(str(int(part)) if part.isdigit() else part for part in name.split("."))
    return key == plain or key.endswith(f".{plain}")


def _nothing(experts: LoraExperts) -> tuple[Tensor, Tensor]:
    d_in, d_out = experts.lora_A.shape[2], experts.lora_B.shape[1]
    return torch.zeros(experts.r, d_in), torch.zeros(d_out, experts.r)


def _check_shapes(source: str, name: str, a: Tensor, b: Tensor, layer: MixtureLinear) -> None:
    if a.shape[1] != layer.in_features or b.shape[0] != layer.out_features:
        raise ValueError(
            f"experts_from: {source} was trained on a {b.shape[0]} x {a.shape[1]} {name}, the base "
            f"model's is {layer.out_features} x {layer.in_features}: another base model"
        )
