"""A step in small, before the run: what does not go together says so at once."""

import torch

from routerlab.diagnostics.collection import DiagnosticSums, flatten
from routerlab.objectives.routed import RoutedObjective
from routerlab.objectives.step import step_totals, sum_over_step


@torch.no_grad()
def rehearse(objective: RoutedObjective) -> None:
    """Runs the model, all losses and all diagnostics on a few tokens, so that losses and routers
    that do not fit raise their ``ValueError`` before any training.
    """
    objective.schedules.apply(0.0)
    length = min(8, getattr(objective.backbone, "max_positions", 8))
    ids = torch.arange(2 * length).view(2, length) % 2
    batch = {"input_ids": ids, "labels": ids, "domain": torch.zeros_like(ids[:, 0])}
    context = objective.context(batch, 0, 0)
    records = objective.backbone(ids, context).router_outputs
    totals, _ = step_totals([context], torch.tensor(ids.numel()))
    step_sums = sum_over_step([objective.losses.step_sums(records, context)])
    objective.losses.shares(records, context, totals, step_sums)
    layers = getattr(objective.backbone, "moe_layers", {})
    objective.losses.weight_shares(layers, context)
    objective.losses.probes(layers)
    sums = DiagnosticSums(objective.diagnostics)
    sums.add(records, context)
    flatten(sums.values(), "router")
