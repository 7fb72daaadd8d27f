"""Which experts a kind of text activates more than another: candidates for steering."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from routerlab.core.checks import within
from routerlab.core.layers import layer_number
from routerlab.core.routing import RouterOutput, RoutingContext


def activation_frequency(record: RouterOutput, context: RoutingContext) -> Float[Tensor, "B E"]:
    """For each sequence, the share of its real tokens that go to each expert; with K experts a
    token a row sums to K. Counts on purpose, not weights (Bandarkar et al., arXiv 2510.04694).
    """
    size = context.batch_size, record.num_experts
    sequence = record.token_indices // context.sequence_length
    places = sequence * record.num_experts + record.expert_indices
    counts = torch.zeros(size, device=places.device)
    counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=counts.dtype))
    lengths = counts.new_full((context.batch_size, 1), context.sequence_length)
    if context.valid is not None:
        lengths = context.valid.view(context.batch_size, -1).sum(1, keepdim=True)
    return counts / lengths.clamp(min=1)


def activation_difference(
    domain: Float[Tensor, "n E"], baseline: Float[Tensor, "m E"]
) -> Float[Tensor, "E"]:
    """The mean frequency over the sequences of a domain, minus that of a baseline (equation 3);
    from -1 to 1, and 0 in sum. Each sequence counts alike, however long it is.
    """
    return domain.mean(0) - baseline.mean(0)


def experts_above(
    differences: Mapping[str, Float[Tensor, "E"]], threshold: int | float
) -> dict[int, list[int]]:
    """The experts whose difference is above the threshold, by the number of their layer: what
    `Steering` takes. Layers without any are left out.
    """
    within("threshold", threshold, -1, 1)
    found = {
        layer_number(name): (difference > threshold).nonzero().flatten().tolist()
        for name, difference in differences.items()
    }
    return {number: experts for number, experts in found.items() if experts}
