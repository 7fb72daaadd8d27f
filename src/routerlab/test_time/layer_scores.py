"""How decided each layer is about a sequence, and what share of the steps that gives it."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.entropy import entropy

SCORES = ("confidence", "negative_entropy", "top_k_mass", "random", "last")
SELECTIONS = ("hard", "soft", "all")


def layer_scores(
    score: str, records: Mapping[str, RouterOutput], context: RoutingContext, seed: int = 0
) -> Float[Tensor, "P L"]:
    """The score of each layer for each sequence; means over its real tokens.

    ``confidence``, ``negative_entropy`` and ``top_k_mass`` (the picked experts' probability) are of
    the router's distribution over all experts; ``last`` prefers deep layers and ``random`` any.
    """
    if score in ("last", "random"):
        layers = torch.arange(1.0, len(records) + 1)
        if score == "random":
            layers = torch.rand(len(records), generator=torch.Generator().manual_seed(seed))
        logits = next(iter(records.values())).router_logits
        return layers.to(logits.device).expand(context.batch_size, -1)
    columns = []
    for record in records.values():
        if score == "confidence":
            values = confidence(record)
        elif score == "negative_entropy":
            values = -entropy(record.router_probs)
        else:
            values = _of_picks(record, record.router_probs)
        values = values.view(context.batch_size, -1)
        read = torch.ones_like(values, dtype=torch.bool)
        if context.valid is not None:
            read = context.valid.view_as(values)
        total = torch.where(read, values, 0.0).sum(1)
        columns.append(total / read.sum(1).clamp(min=1))
    return torch.stack(columns, dim=1).detach()


def confidence(record: RouterOutput) -> Float[Tensor, "T"]:
    r""":math:`-\frac1k \sum_{j \in TopK} \log p_j` of each token, p over all experts and before any
    renormalisation. At least log k, where the picked experts share all of the mass alike; it grows
    when mass leaks to others as well as when shares differ, so it is no entropy.
    """
    picked = record.router_probs.new_zeros(record.router_probs.shape[0])
    counts = picked.index_add(0, record.token_indices, torch.ones_like(record.combine_weights))
    smallest = torch.finfo(record.router_probs.dtype).tiny
    return -_of_picks(record, record.router_probs.clamp(min=smallest).log()) / counts.clamp(min=1)


def layer_shares(
    selection: str, scores: Float[Tensor, "P L"], layer_share: int | float
) -> Float[Tensor, "P L"]:
    r"""Factors on the layers' gradients: ``hard``, 1 for the :math:`\lceil rL \rceil` layers of the
    highest score and 0 for others; ``soft``, :math:`L C_l / \sum_l C_l` [reconstructed]; ``all``,
    1 everywhere.
    """
    if selection == "all":
        return torch.ones_like(scores)
    num_layers = scores.shape[1]
    if selection == "soft":
        return num_layers * scores / scores.sum(1, keepdim=True)
    best = scores.topk(math.ceil(round(layer_share * num_layers, 9)), dim=1).indices
    return torch.zeros_like(scores).scatter(1, best, 1.0)


def _of_picks(record: RouterOutput, values: Float[Tensor, "T E"]) -> Float[Tensor, "T"]:
    """The sum of ``values`` over each token's experts."""
    picks = values[record.token_indices, record.expert_indices]
    return values.new_zeros(len(values)).index_add(0, record.token_indices, picks)
