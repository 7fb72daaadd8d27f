"""Stops a run that was asked to, between two steps."""

from typing import Any

import lightning.pytorch as pl
import torch

from routerlab.training.callbacks.checkpoint import Checkpoint
from routerlab.training.preemption import SIGNALS, Notice, Preempted


class Preemption(pl.Callback):
    """At the end of a step, saves and raises `Preempted` if a signal was noted; every process of
    the run does so at the same step.

    In a validation there is nothing new to save: the run goes back to its newest checkpoint. One
    that has saved no step since it was started goes on instead, because it would come here again.
    """

    def __init__(self, notice: Notice, checkpoint: Checkpoint) -> None:
        self.notice, self.checkpoint = notice, checkpoint
        self._began: int | None = None  # the step where this attempt did
        self._shared_batches = 0  # of a validation, that every process has

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes where this attempt begins."""
        self._began = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Saves the step and stops."""
        if (number := self._asked(trainer)) is not None:
            self.checkpoint.save_now(trainer)
            raise Preempted(number)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the batches at which all processes can agree."""
        mine = torch.tensor(sum(map(int, trainer.num_val_batches)), device=pl_module.device)
        self._shared_batches = int(trainer.strategy.reduce(mine, reduce_op="min"))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stops if the newest checkpoint is one of this attempt."""
        if self._began is None or self.checkpoint.saved_step <= self._began:
            return
        if batch_idx < self._shared_batches and (number := self._asked(trainer)) is not None:
            raise Preempted(number)

    def _asked(self, trainer: pl.Trainer) -> int | None:
        """The signal that any process has noted."""
        mine = self.notice.number
        if trainer.world_size == 1:
            return mine
        asked = trainer.strategy.reduce_boolean_decision(mine is not None, all=False)
        return (mine or SIGNALS[0]) if asked else None
