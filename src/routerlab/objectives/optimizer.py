"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from routerlab.core.checks import within


class OptimizerRecipe:
    """Builds any torch optimizer with linear warm-up and cosine decay.

    Args:
        optimizer: a callable ``(parameter groups) -> Optimizer``.
        warmup_steps: optimizer steps until the full learning rate.
        final_lr_ratio: learning rate at which the schedule ends, over the peak.
        lr_factors: factors on the learning rate of parameters, by a piece of their name; a name
            with several of the pieces takes the product.

    Weight decay applies to matrices, not to vectors (norms, biases).
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        warmup_steps: int = 20,
        final_lr_ratio: float = 0.1,
        lr_factors: Mapping[str, int | float] | None = None,
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps}: must be 0 or more")
        if not 0 <= final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio={final_lr_ratio}: must be from 0 to 1")
        for piece, factor in (lr_factors or {}).items():
            within(f"lr_factors[{piece!r}]", factor, 0, above=True)
        self.optimizer, self.lr_factors = optimizer, dict(lr_factors or {})
        self.warmup_steps, self.final_lr_ratio = warmup_steps, final_lr_ratio

    def build(self, module: nn.Module, max_steps: int) -> tuple[Optimizer, LambdaLR]:
        """The optimizer of the trainable parameters, and its schedule over ``max_steps``."""
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        factors = self._factors(list(trainable))
        groups, scales = [], []
        for scale in sorted(set(factors.values()), key=lambda scale: (scale != 1, scale)):
            members = [p for name, p in trainable.items() if factors[name] == scale]
            matrices = {"params": [p for p in members if p.ndim >= 2]}
            vectors = {"params": [p for p in members if p.ndim < 2], "weight_decay": 0.0}
            found = [group for group in (matrices, vectors) if group["params"]]
            groups += found
            scales += [scale] * len(found)
        optimizer = self.optimizer(groups)
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] *= scale
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, max_steps))

    def _factors(self, names: list[str]) -> dict[str, int | float]:
        """The factor of each parameter."""
        for piece in self.lr_factors:
            if not any(piece in name for name in names):
                raise ValueError(
                    f"lr_factors[{piece!r}]: no trainable parameter has this in its name, such as "
                    f"{names[0] if names else 'none at all'}"
                )
        return {
            name: math.prod(factor for piece, factor in self.lr_factors.items() if piece in name)
            for name in names
        }

    def factor(self, step: int, max_steps: int) -> float:
        """Learning rate of optimizer step ``step`` (from 0) over the peak."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * cosine
