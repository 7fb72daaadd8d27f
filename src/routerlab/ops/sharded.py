"""Weights that may be split over processes (DTensors), as a whole."""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all processes if it is split. Its gradient goes to the own
    shard, and must be the same in all processes.
    """
    gather: Any = getattr(tensor, "full_tensor", None)  # of DTensor, whose import is slow
    return tensor if gather is None else gather()


def run_whole(module: nn.Module, *args: Any) -> Any:
    """``module(*args)`` with whole weights, outside of the forward pass that would gather them."""
    weights = {name: whole(weight) for name, weight in module.named_parameters()}
    return functional_call(module, weights, args)
