"""Models whose weights are split over processes (FSDP2)."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from routerlab.backbones.decoder import Decoder


def why_not_shardable(backbone: nn.Module) -> str | None:
    """What keeps `shard` from splitting a model; None if nothing does."""
    if not isinstance(backbone, Decoder):
        return f"{type(backbone).__name__} cannot be split; a Decoder can (backbone=decoder, saved)"
    if backbone.keeps_trunk:
        return "keep_trunk=true: processes would run other layers than each other"
    for name, layer in backbone.moe_layers.items():
        if getattr(layer.router, "samples", False):
            return f"{name}: a router that samples measures its policy gradient on whole weights"
    return None


def shard(backbone: Decoder, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Splits the weights of ``backbone`` over ``mesh`` (``fully_shard`` of torch): each block is
    gathered when it runs, and its gradient averaged over processes as DDP averages it.

    A layer whose dispatch has ``shard(experts, mesh)`` splits its experts itself, and they stay so.

    Args:
        backbone: with its initial weights.
        mesh: of one dimension, the data-parallel processes.
        dtype: in which experts are gathered, where autocast would cast them to it; gradients are
            summed and weights updated in their own dtype. Routers are gathered as they are.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    elsewhere: set[nn.Parameter] = set()
    for layer in backbone.moe_layers.values():
        if hasattr(layer.dispatch, "shard"):
            layer.dispatch.shard(layer.experts, mesh)
            elsewhere |= set(layer.experts.parameters())
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": elsewhere}
    if dtype is not None:
        cast = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for layer in backbone.moe_layers.values():
            fully_shard(layer.router, **options)
            fully_shard(layer, mp_policy=cast, **options)
    for block in backbone.layers:
        fully_shard(block, **options)
    fully_shard(backbone, **options)
