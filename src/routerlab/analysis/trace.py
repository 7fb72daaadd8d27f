"""Recorded routings: what every router of a model decided on given tokens, in one file."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from routerlab.core.routing import RouterOutput

_VERSION = 1


@dataclass(frozen=True)
class LayerTrace:
    """The kept assignments of one layer; tokens are numbered as in the flattened ``input_ids``."""

    token_indices: Int[Tensor, "N"]
    expert_indices: Int[Tensor, "N"]
    combine_weights: Float[Tensor, "N"]
    num_experts: int


@dataclass(frozen=True)
class Trace:
    """Tokens, their labels, and each layer's assignments, in the order of depth."""

    input_ids: Int[Tensor, "B S"]
    domain_ids: Int[Tensor, "B"]
    domains: list[str]
    layers: dict[str, LayerTrace] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        input_ids: Int[Tensor, "B S"],
        domain_ids: Int[Tensor, "B"],
        domains: list[str],
        router_outputs: Mapping[str, RouterOutput],
    ) -> "Trace":
        """The trace of one forward pass."""
        layers = {
            name: LayerTrace(
                out.token_indices.cpu(),
                out.expert_indices.cpu(),
                out.combine_weights.detach().float().cpu(),
                out.num_experts,
            )
            for name, out in router_outputs.items()
        }
        return cls(input_ids.cpu(), domain_ids.cpu(), list(domains), layers)


def save(path: str | Path, trace: Trace) -> Path:
    """Writes a trace as safetensors: int32 tokens, int16 experts, float32 weights; whole or not at
    all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"input_ids": trace.input_ids.int(), "domain_ids": trace.domain_ids.short()}
    for name, layer in trace.layers.items():
        tensors[f"{name}/token_indices"] = layer.token_indices.int()
        tensors[f"{name}/expert_indices"] = layer.expert_indices.short()
        tensors[f"{name}/combine_weights"] = layer.combine_weights.clone()
    layers = {name: layer.num_experts for name, layer in trace.layers.items()}
    about = {"version": _VERSION, "domains": trace.domains, "layers": layers}
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, scratch, metadata={"routerlab_trace": json.dumps(about)})
    return scratch.replace(path)


def load(path: str | Path) -> Trace:
    """The trace in a file; from a run directory, the one made at its end."""
    path = Path(path)
    if path.is_dir():
        path = path / "traces" / "validation.safetensors"
    if not path.is_file():
        raise ValueError(f"{str(path)!r}: no such trace")
    with _opened(path) as file:
        text = (file.metadata() or {}).get("routerlab_trace")
        if text is None:
            raise ValueError(f"{str(path)!r}: not a routerlab trace")
        about = json.loads(text)
        if about["version"] != _VERSION:
            raise ValueError(f"{str(path)!r}: trace version {about['version']}, not {_VERSION}")
        layers = {
            name: LayerTrace(
                file.get_tensor(f"{name}/token_indices").long(),
                file.get_tensor(f"{name}/expert_indices").long(),
                file.get_tensor(f"{name}/combine_weights"),
                num_experts,
            )
            for name, num_experts in about["layers"].items()
        }
        ids = file.get_tensor("input_ids").long()
        return Trace(ids, file.get_tensor("domain_ids").long(), about["domains"], layers)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r}: not a routerlab trace ({error})") from error


def record(
    backbone: torch.nn.Module, input_ids: Int[Tensor, "B S"], domain_ids: Int[Tensor, "B"],
    domains: list[str],
) -> Trace:  # fmt: skip
    """What the routers of a backbone decide on ``input_ids``, in evaluation mode."""
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        out = backbone(input_ids)
    backbone.train(was_training)
    return Trace.of(input_ids, domain_ids, domains, out.router_outputs)
