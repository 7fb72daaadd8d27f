"""What the routers of a run decide on some held-out sequences."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from routerlab.analysis import trace
from routerlab.objectives.routed import RoutedObjective
from routerlab.objectives.step import Batch
from routerlab.training.assemble import has_tasks
from routerlab.training.processes import is_main_process
from routerlab.training.run_directory import RunDirectory


def record(cfg: DictConfig, run: RunDirectory, data: Any, objective: RoutedObjective) -> None:
    """Keeps the routing of ``cfg.trace_sequences`` held-out sequences, evenly spaced, in
    ``traces/validation.safetensors``; nothing where the model has no router. All processes of the
    run must call it.
    """
    if objective.backbone.moe_layers:
        found = routing(objective, sequences(data, cfg.trace_sequences))
        if is_main_process():
            trace.save(run.path / "traces" / "validation.safetensors", found)


@torch.no_grad()
def routing(objective: RoutedObjective, batch: Batch) -> trace.Trace:
    """What the routers decide on a batch of `sequences`, in evaluation mode; the weights, the state
    of the routers and the random generators stay as they are.
    """
    backbone: Any = objective.backbone
    batch = {key: value.to(objective.device) for key, value in batch.items()}
    if "valid" not in batch:
        with objective.precision():
            return trace.record(backbone, batch["input_ids"], batch["domain"], objective.domains)
    was_training = backbone.training
    backbone.eval()
    context = objective.context(batch, objective.global_step, 0)
    with objective.precision():
        records = backbone(batch["input_ids"], context).router_outputs
    backbone.train(was_training)
    return trace.Trace.of(batch["input_ids"], batch["domain"], objective.domains, records)


def sequences(data: Any, most: int) -> Batch:
    """At most ``most`` held-out sequences, evenly spaced over those of the validations of all
    processes.
    """
    return _items(data, most) if has_tasks(data) else _windows(data, most)


def _windows(data: Any, most: int) -> dict[str, Tensor]:
    """Windows of text [B S] and their domains [B]."""
    dataset = data.val_dataloader().dataset
    count = min(most, len(dataset))
    items = [dataset[i * len(dataset) // count] for i in range(count)]
    return {key: torch.stack([item[key] for item in items]) for key in ("input_ids", "domain")}


def _items(data: Any, most: int) -> dict[str, Tensor]:
    """Items with their right answers, padded on the left."""
    rows: list[dict[str, Tensor]] = []
    own = data.val_dataloader()
    for batch in DataLoader(own.dataset, data.val_batch_size, collate_fn=own.collate_fn):
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
