"""Randomness that a resumed run repeats."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from routerlab.core.seeding import stable_seed


class Reseed(pl.Callback):
    """Seeds torch, numpy and python from (seed, step, rank) before every step.

    Lightning saves no generator state; with stateless seeds there is none to save.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds all three generators."""
        seed = stable_seed(self.seed, trainer.global_step, trainer.global_rank)
        # Not `torch.manual_seed`, which keeps a stack trace for each kind of device not in use.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what libraries use
