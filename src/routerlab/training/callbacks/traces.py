"""How routing changes over training."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig

from routerlab.analysis import trace
from routerlab.objectives.routed import RoutedObjective
from routerlab.objectives.step import Batch
from routerlab.training.recording import routing, sequences
from routerlab.training.run_directory import RunDirectory


def validation_traces(
    cfg: DictConfig, run: RunDirectory, data: Any, objective: RoutedObjective
) -> list[pl.Callback]:
    """`ValidationTraces` where the config wants it and the model has routers."""
    wanted = cfg.get("trace_validations") and cfg.trace_sequences
    if not (wanted and objective.backbone.moe_layers):
        return []
    return [ValidationTraces(run.path / "traces", sequences(data, cfg.trace_sequences))]


class ValidationTraces(pl.Callback):
    """Keeps what the routers decide on the same sequences at every validation, in
    ``<folder>/step_000200.safetensors``. A resumed run writes the files of repeated steps again.
    """

    def __init__(self, folder: Path, batch: Batch) -> None:
        self.folder, self.batch = folder, batch
        self._last: int | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records once a step; the main process writes."""
        assert isinstance(pl_module, RoutedObjective)
        step = trainer.global_step
        if step == self._last:  # the headline repeats the last step
            return
        self._last = step
        found = routing(pl_module, self.batch)
        if trainer.is_global_zero:
            trace.save(self.folder / f"step_{step:06d}.safetensors", found)
