"""How sure the router is of single tokens, and how varied it is over all of them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext


class RouterEntropy:
    r"""Entropies of ``router_probs`` p (the full distribution), divided by :math:`\ln E`.

    ``mean_entropy`` is the mean over tokens of H(p): 0 when every choice is certain.
    ``entropy_of_mean`` is H of the mean p: 1 when experts are used evenly.
    ``mutual_information`` is their difference, between token and expert: high when the router is
    both balanced and certain.
    """

    def sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> dict[str, Tensor]:
        """Summed probabilities [E], summed entropies and the number of tokens."""
        probs = output.without_padding(output.router_probs)
        entropy = torch.special.entr(probs).sum()
        return {
            "probs": probs.sum(0),
            "entropy": entropy,
            "tokens": entropy.new_full((), len(probs)),
        }

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The numbers named above."""
        tokens = sums["tokens"].clamp(min=1)
        scale = math.log(max(len(sums["probs"]), 2))
        mean_entropy = sums["entropy"] / tokens / scale
        entropy_of_mean = torch.special.entr(sums["probs"] / tokens).sum() / scale
        return {
            "mean_entropy": mean_entropy,
            "entropy_of_mean": entropy_of_mean,
            "mutual_information": entropy_of_mean - mean_entropy,
        }
