"""Strategies of lightning for several processes."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from routerlab.ops.sharded import whole


class FullySharded(ModelParallelStrategy):
    """Weights, gradients and optimizer state split over all processes (FSDP2), as
    ``configure_model`` of the objective does it.

    A checkpoint is the one file that a single process would write, with whole tensors, written by
    the checkpoint plugin: any number of processes, with or without this strategy, goes on from it.
    Each process reads the file itself. (Lightning's own reader takes the numbers of optimizer
    states for the order of the model's parameters, which ours, with several groups, is not.)
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """All processes are data-parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state in whole tensors, in the main process; empty elsewhere."""
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state in whole tensors, in the main process; empty elsewhere."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        found = optimizer.state_dict()
        state = {number: self._gathered(values) for number, values in found["state"].items()}
        return found | {"state": state} if self.is_global_zero else {}

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Puts the state of module and optimizers where it belongs; returns the whole file."""
        path = self.broadcast(checkpoint_path)
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        module = self.lightning_module
        assert module is not None
        parameters = dict(module.named_parameters(remove_duplicate=False))
        module.load_state_dict(
            _split(checkpoint["state_dict"], parameters), strict=module.strict_loading
        )
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            held = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [n for group in saved["param_groups"] for n in group["params"]]
            like = dict(zip(numbers, held, strict=True))
            state = {
                number: _split(values, dict.fromkeys(values, like[number]))
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict(saved | {"state": state})
        return checkpoint

    def _gathered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Whole copies in memory, in the main process alone; all processes must ask."""
        found = {}
        for name, value in values.items():
            full = whole(value.detach()) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                found[name] = full.cpu() if isinstance(full, Tensor) else full
        return found


def _split(values: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors, each split as that of its name in ``like`` is, if it is and has its shape."""
    return dict(values) | {
        name: distribute_tensor(
            values[name].to(other.device), other.device_mesh, other.placements, src_data_rank=None
        )
        for name, other in like.items()
        if isinstance(other, DTensor) and name in values and values[name].shape == other.shape
    }
