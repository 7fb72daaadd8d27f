"""How many experts a token has."""

from collections.abc import Mapping

import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext, count_experts


class ExpertsPerToken:
    """The number n of experts that work on a token: kept assignments, padding excluded.

    ``experts_per_token`` the mean of n; ``experts_per_token_std`` its population standard
    deviation; ``uncovered_share`` the share of tokens with n = 0, which pass the layer unchanged;
    ``experts_per_token_shares`` [E + 1] the share of tokens with n = 0, 1, ... E;
    ``weight_sum`` the mean over tokens of the sum of their combine weights.
    """

    def sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> dict[str, Tensor]:
        """Tokens by their number of experts [E + 1], and the summed combine weights."""
        every = output.router_logits.new_zeros(len(output.router_logits), dtype=torch.long)
        every.scatter_add_(0, output.token_indices, torch.ones_like(output.token_indices))
        counts = count_experts(output.without_padding(every), output.num_experts + 1)
        return {"tokens": counts, "weight": output.combine_weights.sum()}

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The numbers named above."""
        total = sums["tokens"].sum().clamp(min=1)
        shares = sums["tokens"] / total
        number = torch.arange(len(shares), dtype=shares.dtype, device=shares.device)
        mean = (shares * number).sum()
        return {
            "experts_per_token": mean,
            "experts_per_token_std": (shares * (number - mean).square()).sum().sqrt(),
            "uncovered_share": shares[0],
            "experts_per_token_shares": shares,
            "weight_sum": sums["weight"] / total,
        }
