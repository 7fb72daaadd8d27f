"""A step in small, before the run: what does not go together says so at once."""

import torch
from torch import Tensor

from routerlab.diagnostics.collection import DiagnosticSums, flatten
from routerlab.objectives.routed import RoutedObjective
from routerlab.objectives.step import step_totals, sum_over_step


@torch.no_grad()
def rehearse(objective: RoutedObjective) -> None:
    """Runs the model, all losses and all diagnostics on a few tokens, so that losses and routers
    that do not fit raise their ``ValueError`` before any training. Each process for itself, on the
    CPU, where the processes of an earlier run in this job may not be able to exchange tensors.
    """
    objective.schedules.apply(0.0)
    batch = objective.example(min(8, getattr(objective.backbone, "max_positions", 8)))
    context = objective.context(batch, 0, 0)
    out = objective.run(batch, context)
    objective.task_loss(out.logits, batch)
    records = out.router_outputs
    if objective.losses.by_name and not records:
        names = ", ".join(objective.losses.by_name)
        raise ValueError(
            f"loss=[{names}]: the model has no router that it could judge; use loss=[]"
        )
    totals, _ = step_totals([context], objective.num_targets(batch).sum(), _own)
    step_sums = sum_over_step([objective.losses.step_sums(records, context)], reduce=_own)
    objective.losses.shares(records, context, totals, step_sums)
    layers = getattr(objective.backbone, "moe_layers", {})
    objective.losses.weight_shares(layers, context)
    objective.losses.probes(layers)
    sums = DiagnosticSums(objective.diagnostics)
    sums.add(records, context)
    flatten(sums.values(), "router")


def _own(sums: Tensor) -> Tensor:
    return sums
