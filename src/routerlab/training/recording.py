"""What the routers of a finished run decide on some held-out sequences."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

from routerlab.analysis import trace
from routerlab.objectives.routed import RoutedObjective
from routerlab.training.assemble import has_tasks
from routerlab.training.run_directory import RunDirectory


@torch.no_grad()
def record(cfg: DictConfig, run: RunDirectory, data: Any, objective: RoutedObjective) -> None:
    """Keeps the routing of ``cfg.trace_sequences`` held-out sequences, evenly spaced, in
    ``traces/validation.safetensors``; nothing where the model has no router.
    """
    backbone: Any = objective.backbone
    if not backbone.moe_layers:
        return
    if has_tasks(data):
        batch = _items(data, cfg.trace_sequences)
        batch = {key: value.to(objective.device) for key, value in batch.items()}
        was_training = backbone.training
        backbone.eval()
        context = objective.context(batch, objective.global_step, 0)
        records = backbone(batch["input_ids"], context).router_outputs
        backbone.train(was_training)
        found = trace.Trace.of(batch["input_ids"], batch["domain"], objective.domains, records)
    else:
        ids, domains = (value.to(objective.device) for value in _windows(data, cfg.trace_sequences))
        found = trace.record(backbone, ids, domains, objective.domains)
    trace.save(run.path / "traces" / "validation.safetensors", found)


def _windows(data: Any, most: int) -> list[Tensor]:
    """Evenly spaced held-out windows [B S] and their domains [B]."""
    dataset = data.val_dataloader().dataset
    count = min(most, len(dataset))
    items = [dataset[i * len(dataset) // count] for i in range(count)]
    return [torch.stack([item[key] for item in items]) for key in ("input_ids", "domain")]


def _items(data: Any, most: int) -> dict[str, Tensor]:
    """Right answers only, evenly spaced over the held-out items, padded on the left."""
    rows: list[dict[str, Tensor]] = []
    for batch in data.val_dataloader():
        for row in batch["gold"].nonzero().flatten().tolist():
            rows.append({key: batch[key][row] for key in ("input_ids", "valid", "prompt", "task")})
    count = min(most, len(rows))
    rows = [rows[i * len(rows) // count] for i in range(count)]
    longest = max(int(row["valid"].sum()) for row in rows)
    cut = [{k: v[-longest:] if v.ndim else v for k, v in row.items()} for row in rows]
    batch = {key: torch.stack([_padded(row[key], longest) for row in cut]) for key in rows[0]}
    return batch | {"domain": batch["task"]}


def _padded(value: Tensor, length: int) -> Tensor:
    return F.pad(value, (length - len(value), 0)) if value.ndim else value
