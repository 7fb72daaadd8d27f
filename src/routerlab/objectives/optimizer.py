"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class OptimizerRecipe:
    """Builds any torch optimizer with linear warm-up and cosine decay.

    Args:
        optimizer: a callable ``(parameter groups) -> Optimizer``.
        warmup_steps: optimizer steps until the full learning rate.
        final_lr_ratio: learning rate at which the schedule ends, over the peak.

    Weight decay applies to matrices, not to vectors (norms, biases).
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        warmup_steps: int = 20,
        final_lr_ratio: float = 0.1,
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps}: must be 0 or more")
        if not 0 <= final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio={final_lr_ratio}: must be from 0 to 1")
        self.optimizer = optimizer
        self.warmup_steps, self.final_lr_ratio = warmup_steps, final_lr_ratio

    def build(self, module: nn.Module, max_steps: int) -> tuple[Optimizer, LambdaLR]:
        """The optimizer of the trainable parameters, and its schedule over ``max_steps``."""
        trainable = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2]},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = self.optimizer([group for group in groups if group["params"]])
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, max_steps))

    def factor(self, step: int, max_steps: int) -> float:
        """Learning rate of optimizer step ``step`` (from 0) over the peak."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * cosine
