"""Steps and checkpoints of the quickstart model, timed in a real training."""

import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from routerlab.bench.layer import Settings
from routerlab.core.config import compose
from routerlab.training import assemble
from routerlab.training.callbacks.checkpoint import Checkpoint, KeepConfig
from routerlab.training.callbacks.reseed import Reseed

_SAVE_EVERY = 5
_WARM = 2  # saves, and the steps before them, that are not counted


@dataclass(frozen=True, slots=True)
class Saving:
    """Seconds of each checkpoint and of a usual step, and the size of a checkpoint."""

    saves: list[float]
    step: float
    mebibytes: float


def measure_saving(settings: Settings, folder: Path) -> Saving:
    """Trains on random tokens for about ``settings.seconds``, with a checkpoint in ``folder`` after
    every few steps.
    """
    accelerator = "gpu" if settings.device.type == "cuda" else "cpu"
    words = (f"seed={settings.seed}", f"trainer.accelerator={accelerator}", "trainer.devices=1")
    cfg = compose("experiment=quickstart", *words)
    assemble.quiet()
    torch.manual_seed(settings.seed)
    objective = assemble.build_objective(cfg)
    clock = _Clock(settings)
    checkpoint = _Timed(settings)
    checkpoint.dirpath = str(folder / "checkpoints")
    callbacks: list[pl.Callback] = [Reseed(cfg.seed), clock, KeepConfig(cfg, {}), checkpoint]
    trainer = assemble.build_trainer(cfg, folder, callbacks, [])
    batches: Any = _Batches(cfg.data.batch_size, cfg.data.seq_len, cfg.backbone.vocab_size)
    objective.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have no `val_dataloader`")  # saving is the subject
        trainer.fit(objective, DataLoader(batches, batch_size=None))
    newest = max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    steps = clock.steps[_WARM * _SAVE_EVERY :]
    size = newest.stat().st_size / 2**20
    return Saving(checkpoint.saves[_WARM:], statistics.median(steps), size)


class _Batches(torch.utils.data.IterableDataset):
    """Random tokens without end."""

    def __init__(self, rows: int, length: int, symbols: int) -> None:
        self.shape, self.symbols = (rows, length + 1), symbols

    def __iter__(self) -> Any:
        while True:
            ids = torch.randint(self.symbols, self.shape)
            domain = torch.zeros(len(ids), dtype=torch.long)
            yield {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "domain": domain}


class _Clock(pl.Callback):
    """Times steps, and ends the training when enough of them were saved."""

    def __init__(self, settings: Settings) -> None:
        self.now, self.most = settings.clock, settings.seconds
        self.steps: list[float] = []
        self._began = self._start = self.now()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The time of the whole."""
        self._began = self.now()

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """The time of a step."""
        self._start = self.now()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Before any checkpoint of the step."""
        self.steps.append(self.now() - self._start)
        enough = len(self.steps) >= (_WARM + 3) * _SAVE_EVERY
        if enough and self.now() - self._began >= self.most:
            trainer.should_stop = True


class _Timed(Checkpoint):
    """Times what it saves."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(every_n_steps=_SAVE_EVERY)
        self.now, self.saves = settings.clock, []

    def _save_topk_checkpoint(self, *arguments: Any, **named: Any) -> None:
        start = self.now()
        super()._save_topk_checkpoint(*arguments, **named)
        self.saves.append(self.now() - start)
