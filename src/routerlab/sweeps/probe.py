"""What a training step costs on this machine."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, open_dict

from routerlab.training import assemble

_SECONDS, _STEPS, _WARM_UP = 5.0, 30, 2


class _Clock(pl.Callback):
    """Notes the time after each step, and stops after `_SECONDS`."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())
        late = self.times[-1] - self.times[0] > _SECONDS
        trainer.should_stop = late and len(self.times) > _WARM_UP + 1


def seconds_of_a_step(cfg: DictConfig, threads: int) -> float:
    """The median over a few training steps of the run that ``cfg`` describes, on one device, with
    ``threads`` threads; keeps nothing of it.
    """
    assemble.quiet()
    cfg, before = cfg.copy(), torch.get_num_threads()
    with open_dict(cfg):
        cfg.trainer.update(
            max_steps=_STEPS, devices=1, num_nodes=1, strategy="auto", limit_val_batches=0,
            enable_checkpointing=False,
        )  # fmt: skip
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(cfg.seed)
        data = assemble.build_data(cfg)
        objective = assemble.build_objective(cfg, data)
        clock = _Clock()
        with tempfile.TemporaryDirectory() as scratch:
            trainer = assemble.build_trainer(cfg, Path(scratch), [clock], [])
            objective.train()
            trainer.fit(objective, datamodule=data)
    finally:
        torch.set_num_threads(before)
    pairs = list(zip(clock.times, clock.times[1:], strict=False))[_WARM_UP - 1 :]
    return statistics.median(after - before for before, after in pairs)
