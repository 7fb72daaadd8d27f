"""How evenly the experts share the work."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext


class ExpertLoad:
    r"""Balance of the requested assignments c, counted before capacity drops, padding excluded.

    With load :math:`f = c / \sum c`: ``expert_load`` f [E]; ``load_cv`` population std / mean;
    ``max_violation`` :math:`\max c / \bar c - 1` (Wang et al., arXiv 2408.15664) and, by analogy
    (the name is ours), ``min_violation`` :math:`1 - \min c / \bar c`; ``load_entropy``
    :math:`H(f) / \ln E`; ``effective_experts`` :math:`1 / \sum f^2`; ``dead_experts`` the number
    of experts with no assignment;
    ``dropped_share`` the share of assignments lost to capacity.
    """

    def sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> dict[str, Tensor]:
        """Requested and dropped assignments, each [E]."""
        return {"requests": output.requests_per_expert, "dropped": output.dropped_per_expert}

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The numbers named above."""
        counts = sums["requests"]
        total = counts.sum().clamp(min=1)
        load, mean = counts / total, total / len(counts)
        entropy = torch.special.entr(load).sum()
        return {
            "expert_load": load,
            "load_cv": (counts - counts.mean()).square().mean().sqrt() / mean,
            "max_violation": counts.max() / mean - 1,
            "min_violation": 1 - counts.min() / mean,
            "load_entropy": entropy / math.log(max(len(counts), 2)),
            "effective_experts": 1 / load.square().sum().clamp(min=1e-12),
            "dead_experts": (counts == 0).sum().to(counts.dtype),
            "dropped_share": sums["dropped"].sum() / total,
        }
