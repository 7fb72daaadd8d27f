"""How close the router's choice is to another one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext


class SelectionMargin:
    r"""Means over tokens of the full distribution p (``router_probs``), padding excluded.

    ``top1_prob`` :math:`\max_e p_e`; ``boundary_margin``
    :math:`\min_{e \in S} p_e - \max_{e \notin S} p_e` (the name is ours), which for top-k on p is
    :math:`p_{(K)} - p_{(K+1)}`. S holds the kept assignments; a token with none, or with all
    experts, has no boundary and counts 0. Negative where something other than p chose (an expert
    bias, a capacity).
    """

    def sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> dict[str, Tensor]:
        """Summed top-1 probability, summed margin and the number of tokens."""
        probs = output.without_padding(output.router_probs)
        chosen = output.without_padding(output.dispatch_mask)
        lowest = torch.where(chosen, probs, torch.inf).amin(-1)
        highest = torch.where(chosen, -torch.inf, probs).amax(-1)
        margin = lowest - highest
        return {
            "top1": probs.amax(-1).sum(),
            "margin": torch.where(margin.isfinite(), margin, 0.0).sum(),
            "tokens": probs.new_full((), len(probs)),
        }

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The numbers named above."""
        tokens = sums["tokens"].clamp(min=1)
        return {
            "top1_prob": sums["top1"] / tokens,
            "boundary_margin": sums["margin"] / tokens,
        }
