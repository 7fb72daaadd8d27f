"""State that routers keep between steps: gathered from records, moved after the optimizer step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from routerlab.objectives.step import Records, Sums, sum_over_step


def state_sums(records: Records) -> Sums:
    """What the routers that keep state will be told of a micro-batch."""
    sums: Sums = {}
    for layer, output in records.items():
        if output.proposal is not None:
            sums["requests", layer] = output.requests_per_expert
            sums["proposal", layer] = output.proposal.detach()
    return sums


@torch.no_grad()
def update_routers(routers: Mapping[str, Any], states: Sequence[Sums]) -> None:
    """Hands each of these routers the counts of the step and its mean proposal."""
    requests = [{k: v for k, v in part.items() if k[0] == "requests"} for part in states]
    proposals = [{k: v for k, v in part.items() if k[0] == "proposal"} for part in states]
    counts, means = sum_over_step(requests), sum_over_step(proposals, mean=True)
    for _, layer in counts:
        proposal = means["proposal", layer].to(states[0]["proposal", layer].dtype)
        routers[layer].update(counts["requests", layer].long(), proposal)
