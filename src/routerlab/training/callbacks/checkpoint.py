"""Checkpoints that survive a kill at any moment."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf


class Checkpoint(ModelCheckpoint):
    """Saves every ``every_n_steps`` optimizer steps and after the last; the ``keep`` newest stay.

    Where they go is set by the run (``dirpath``).
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 2) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be at least 1")
        if keep < 2:
            raise ValueError(f"keep={keep}: must be at least 2, one to fall back to")
        super().__init__(
            filename="step_{step:06d}",
            auto_insert_metric_name=False,
            monitor="step",  # always there, and the way to keep the newest
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Saves a due step; on SIGTERM any step, since lightning stops right after it."""
        super().on_train_batch_end(trainer, *args, **kwargs)
        if trainer.received_sigterm:
            self.save_now(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last step."""
        self.save_now(trainer)

    @property
    def saved_step(self) -> int:
        """The newest step that was saved since this process began, or 0."""
        return self._last_global_step_saved

    def save_now(self, trainer: pl.Trainer) -> None:
        """Saves the step that has just ended, unless that is done."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class KeepConfig(pl.Callback):
    """Puts the resolved config and what text it is into every checkpoint, as plain containers."""

    def __init__(self, cfg: DictConfig, corpus: dict[str, Any]) -> None:
        self.config, self.corpus = OmegaConf.to_container(cfg, resolve=True), corpus

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds them under ``config`` and ``corpus``."""
        checkpoint["config"], checkpoint["corpus"] = self.config, self.corpus


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs and renames: a checkpoint is whole or it is not there."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Writes ``checkpoint`` (plain containers and tensors) to ``path``."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(target.name + ".tmp")
        try:
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)
        except BaseException as error:
            full = isinstance(error, RuntimeError) and shutil.disk_usage(target.parent).free < 2**20
            scratch.unlink(missing_ok=True)  # half a file would keep the disk full
            if full:  # torch speaks of an unexpected position
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
            raise
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
