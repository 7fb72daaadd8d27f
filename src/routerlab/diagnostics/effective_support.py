"""How many experts really count for a token: the collapse that balance over tokens hides."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.selection import effective_support_size

_STEPS = 2048  # of the histograms from 1 to E, at least


class EffectiveSupport:
    r"""The effective support size :math:`(\sum_i |w_i|)^2 / \sum_i w_i^2` of single tokens, from 1
    (one expert has all the weight) to E (Qiu et al., arXiv 2603.10160).

    ``probs_ess_mean``, ``probs_ess_min`` and ``probs_ess_p05`` (the smallest value that at least
    5 % of tokens do not exceed) of the full distribution ``router_probs``; ``ess_mean``,
    ``ess_min`` and ``ess_p05`` of the combine weights in use. Padding is in none of them, nor in
    the last three tokens that no expert has a weight for; 0 where no token is left.

    Means are exact. The minimum and the percentile come from histograms of at least 2048 steps from
    1 to E that hit all whole numbers, so K equal weights give K, and others are off by half a step.
    """

    def sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> dict[str, Tensor]:
        """For both kinds of weights, tokens by effective support size and the sum of the sizes."""
        tokens, weights = output.token_indices, output.combine_weights.double()
        nothing = weights.new_zeros(len(output.router_probs))
        total = nothing.index_add(0, tokens, weights.abs())
        squares = nothing.index_add(0, tokens, weights.square())
        probs = output.without_padding(output.router_probs).double()
        sizes = {
            "probs_ess": effective_support_size(probs),
            "ess": torch.where(squares > 0, total.square() / squares, 0.0),
        }
        histograms = {name: _histogram(size, output.num_experts) for name, size in sizes.items()}
        return histograms | {f"{name}_sum": size.sum() for name, size in sizes.items()}

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The numbers named above."""
        found = {}
        for name in ("probs_ess", "ess"):
            steps, reached = sums[name].shape[1], sums[name].flatten().cumsum(0)
            count = reached[-1]
            found[f"{name}_mean"] = sums[f"{name}_sum"] / count.clamp(min=1)
            for key, needed in (("min", torch.ones_like(count)), ("p05", count / 20)):
                place = torch.searchsorted(reached, needed.clamp(max=count))
                found[f"{name}_{key}"] = (1 + place.to(count) / steps) * (count > 0)
        return found


def _histogram(sizes: Float[Tensor, "n"], num_experts: int) -> Float[Tensor, "E steps"]:
    """Tokens by the nearest of the values 1 + i + j / steps, i a row and j a column; a size of 0 is
    of no token. (No token is selected by a mask: a GPU need not be waited for.)
    """
    steps = -(-_STEPS // max(num_experts - 1, 1))
    counts = sizes.new_zeros(num_experts * steps)
    place = ((sizes - 1) * steps).round().long().clamp(0, (num_experts - 1) * steps)
    return counts.index_add(0, place, (sizes > 0).to(sizes.dtype)).view(num_experts, steps)
