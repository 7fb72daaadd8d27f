"""Layers below the first adapted one see every sample of a policy alike: they run once for all."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

_OF_HEADS = {"alibi", "position_bias"}  # what blocks are given, not by sequence but by head


class SharedTrunk:
    """Lets a model take each sequence once and go on with M copies from its first adapted layer.

    Below that layer all is frozen and nothing is drawn, so the copies are equal: the result is that
    of M copies from the start, at the cost of one below. The layers are those of the `ModuleList`
    that holds the adapters (decoder blocks). A plain object: its hooks register nothing.

    ``fits`` is False for models whose blocks are given biases of attention heads (Bloom, MPT),
    which have no row a sequence: those need their M copies from the start.
    """

    def __init__(self, model: nn.Module) -> None:
        self.replicas, self.batch_size = 1, 0
        blocks = _adapted_blocks(model)
        self.fits = not any(_OF_HEADS & _arguments(block) for block in blocks)
        for layer in blocks:
            layer.register_forward_pre_hook(self._repeat, with_kwargs=True)

    @contextmanager
    def copies(self, replicas: int, batch_size: int) -> Iterator[None]:
        """Inside, a pass of ``batch_size`` sequences comes out as ``replicas`` blocks of them."""
        self.replicas, self.batch_size = replicas, batch_size
        try:
            yield
        finally:
            self.replicas = 1

    def _repeat(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.replicas == 1:
            return None
        return self._copied(args), self._copied(kwargs)

    def _copied(self, value: Any) -> Any:
        """``value`` with the tensors that have a row a sequence repeated: hidden states where they
        are not yet, masks and positions at every layer.
        """
        if isinstance(value, Tensor):
            rows = value.ndim > 1 and value.shape[0] == self.batch_size
            return value.repeat(self.replicas, *(1,) * (value.ndim - 1)) if rows else value
        if isinstance(value, dict):
            return {key: self._copied(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(self._copied(item) for item in value)
        return value


def _adapted_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks from the first one that holds an adapter to the last; all that adapters are in."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            held = [any(isinstance(m, BaseTunerLayer) for m in block.modules()) for block in module]
            if any(held):
                return list(module[held.index(True) :])
    return []


def _arguments(block: nn.Module) -> set[str]:
    """The names of what a block takes."""
    return set(inspect.signature(block.forward).parameters)
