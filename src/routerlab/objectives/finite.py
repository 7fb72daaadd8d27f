"""The promise that an optimizer step whose loss or gradient is not finite is not taken."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from routerlab.core.routing import RoutingContext
from routerlab.objectives.step import Batch


@dataclass(frozen=True, slots=True)
class Attempt:
    """An optimizer step that is about to be taken: its loss, gradient norm and micro-batches."""

    step: int
    loss: Tensor
    norm: Tensor
    parts: list[Batch]
    contexts: list[RoutingContext]


class FiniteSteps:
    """Watches steps, where it can without waiting for the device.

    To read a loss is to wait for it. An optimizer that obeys ``found_inf`` (torch's fused ones,
    made for gradient scalers) is told on the device instead: it takes neither the first step that
    is not finite nor any later one, until someone looks (`not_finite`). On the CPU, and with other
    optimizers, each step must be looked at before it is taken.
    """

    def __init__(self) -> None:
        self._attempts: list[Attempt] = []
        self._stopped: Tensor | None = None  # 1 once a step was not finite, else 0

    def watch(self, attempt: Attempt, optimizer: Optimizer) -> bool:
        """Watches a step; returns whether it must be looked at before it is taken."""
        self._attempts.append(attempt)
        obeys = getattr(optimizer, "_step_supports_amp_scaling", False)
        if not (obeys and self._would_wait(attempt.loss)):
            return True
        bad = ~(attempt.loss.isfinite() & attempt.norm.isfinite())
        stopped = bad.float()
        if self._stopped is not None:
            stopped = torch.maximum(stopped, self._stopped)
        self._stopped = optimizer.found_inf = stopped  # type: ignore[attr-defined]
        return False

    def not_finite(self) -> Iterator[tuple[Attempt, float, float]]:
        """The steps watched since the last look that are not finite, with loss and norm."""
        attempts, self._attempts = self._attempts, []
        if not attempts:
            return
        values = torch.stack([torch.stack([each.loss, each.norm]) for each in attempts])
        for attempt, (loss, norm) in zip(attempts, values.tolist(), strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                yield attempt, loss, norm

    @staticmethod
    def _would_wait(value: Tensor) -> bool:
        return value.device.type != "cpu"
