"""A Trainer's steps without a run directory, and what they returned."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader


def fit(
    model: pl.LightningModule,
    batches: list[Any],
    path: Path,
    validation: list[Any] | None = None,
    callbacks: list[pl.Callback] | None = None,
) -> None:
    """One optimizer step a batch, and a validation at the end if there is something for it."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=len(batches), num_sanity_val_steps=0,
        val_check_interval=len(batches) if validation else None, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=path,
    )  # fmt: skip
    loaders = [b and DataLoader(b, batch_size=None) for b in (batches, validation)]
    trainer.fit(model, *loaders)


class Remember(pl.Callback):
    """Keeps what each training step returned."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """After each step."""
        self.results.append(outputs)
