"""Sends what the objective returned to the loggers."""

import time
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from routerlab.objectives.routed import RoutedObjective
from routerlab.training.loggers import MetricsFiles
from routerlab.training.weights_and_biases import Wandb


class Metrics(pl.Callback):
    """Adds throughput to due steps, and hands scalars and distributions to every logger in one
    call. Keeps the seconds spent in training steps, over restarts too.
    """

    def __init__(self) -> None:
        self.logs_validation = True
        self.train_seconds = 0.0
        self._tokens: int | Tensor = 0  # where batches are, so that only who reads it waits
        self._since = (0, 0.0)  # tokens, seconds at the last log
        self._start = 0.0

    @property
    def tokens(self) -> int:
        """Real tokens of all steps, over all processes."""
        return int(self._tokens)

    def state_dict(self) -> dict[str, Any]:
        """Totals so far, for the checkpoint."""
        return {"train_seconds": self.train_seconds, "tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Totals of the run that is resumed."""
        self.train_seconds, self._tokens = state_dict["train_seconds"], state_dict["tokens"]
        self._since = (self.tokens, self.train_seconds)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs a due step."""
        self.train_seconds += time.perf_counter() - self._start
        real = batch["valid"].sum() if "valid" in batch else batch["input_ids"].numel()
        self._tokens = self._tokens + real * trainer.world_size
        if not outputs["due"]:
            return
        total, (tokens, seconds) = self.tokens, self._since
        self._since = (total, self.train_seconds)
        speed = (total - tokens) / (self.train_seconds - seconds)
        outputs["scalars"]["train/tokens_per_second"] = speed
        self._log(trainer, outputs["scalars"], outputs["distributions"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs a validation."""
        assert isinstance(pl_module, RoutedObjective)
        scalars, distributions = pl_module.validation_result
        files = [logger for logger in trainer.loggers if isinstance(logger, MetricsFiles)]
        known = any(file.has(trainer.global_step, "val/loss") for file in files)  # of a restart
        if self.logs_validation and not known:
            self._log(trainer, scalars, distributions)

    def _log(self, trainer: pl.Trainer, scalars: dict[str, float], distributions: dict) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
            if isinstance(logger, MetricsFiles | Wandb):  # scalars are all that others know
                logger.log_distributions(distributions, step=trainer.global_step)
