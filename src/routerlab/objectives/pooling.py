"""All layers of a micro-batch as one record, for losses that say ``pool_layers``."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.objectives.step import Records

POOLED = "all layers"  # what stands for a layer's name in the sums of a pooled record
_BY_SEQUENCE = ("domain_ids", "task_ids", "sample_ids", "noise_level", "sequence_embedding")
_BY_TOKEN = ("valid", "prompt", "token_ids")


def pooled(records: Records, context: RoutingContext) -> tuple[RouterOutput, RoutingContext]:
    """The record and the context of a batch that holds every sequence once for each layer: the
    tokens of the first layer, then those of the second, and so on. A layer's proposal is its own
    and not in it.

    Raises:
        ValueError: layers that differ in their number of experts.
    """
    _check_sizes(records)
    outputs = list(records.values())
    starts = accumulate((len(output.router_logits) for output in outputs), initial=0)
    tokens = [o.token_indices + start for o, start in zip(outputs, starts, strict=False)]
    top_k = {output.top_k for output in outputs}
    record = RouterOutput(
        router_logits=torch.cat([output.router_logits for output in outputs]),
        router_probs=torch.cat([output.router_probs for output in outputs]),
        token_indices=torch.cat(tokens),
        expert_indices=torch.cat([output.expert_indices for output in outputs]),
        combine_weights=torch.cat([output.combine_weights for output in outputs]),
        dropped_per_expert=torch.stack([o.dropped_per_expert for o in outputs]).sum(0),
        top_k=top_k.pop() if len(top_k) == 1 else None,
        log_prob=_joined([output.log_prob for output in outputs]),
        selection_probs=_joined([output.selection_probs for output in outputs]),
        valid=_valid(outputs),
    )
    found = {name: getattr(context, name) for name in (*_BY_SEQUENCE, *_BY_TOKEN)}
    rows = {n: torch.cat([v] * len(outputs)) for n, v in found.items() if v is not None}
    return record, replace(context, batch_size=context.batch_size * len(outputs), **rows)


def _check_sizes(records: Records) -> None:
    sizes = {layer: output.num_experts for layer, output in records.items()}
    first, size = next(iter(sizes.items()))
    for layer, other in sizes.items():
        if other != size:
            raise ValueError(
                f"pool_layers=True: all layers must have the same number of experts, but {first} "
                f"has {size} and {layer} has {other}; set pool_layers=false"
            )


def _joined(values: Sequence[Tensor | None]) -> Tensor | None:
    """One after another, where all layers have them."""
    found = [value for value in values if value is not None]
    return torch.cat(found) if len(found) == len(values) else None


def _valid(outputs: Sequence[RouterOutput]) -> Tensor | None:
    if all(output.valid is None for output in outputs):
        return None
    every = [torch.ones_like(output.router_logits[:, 0], dtype=torch.bool) for output in outputs]
    masks = (o.valid for o in outputs)
    return torch.cat([e if m is None else m for e, m in zip(every, masks, strict=True)])
