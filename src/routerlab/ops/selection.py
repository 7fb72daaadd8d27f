"""Which experts a token uses when their number is not fixed, and how they are weighed."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def above_threshold(scores: Float[Tensor, "T E"], threshold: float | Tensor) -> Bool[Tensor, "T E"]:
    """Experts that score strictly above the threshold (a number, or [T, 1]); a token without any
    uses its best one, the first of those that tie.
    """
    mask = scores > threshold
    best = torch.zeros_like(mask).scatter_(-1, scores.argmax(-1, keepdim=True), True)
    return torch.where(mask.any(-1, keepdim=True), mask, best)


def lower_percentile(values: Float[Tensor, "*batch n"], share: float) -> Float[Tensor, "*batch"]:
    """The order statistic number ``floor(share * (n - 1))``, from 0, of the last dimension.

    Strictly above it lie the same values as above the linearly interpolated percentile, which is
    in the gap to the next order statistic; without interpolation no rounding can close that gap.
    """
    place = _place(values.shape[-1], share)
    return values.sort(-1).values[..., place]


def count_above_percentile(num_values: int, share: float) -> int:
    """How many of so many distinct values lie above their percentile; at least 1."""
    return max(1, num_values - 1 - _place(num_values, share))


def _place(num_values: int, share: float) -> int:
    return math.floor(share * (num_values - 1) + 1e-9)  # .29 * 100 is 29, not 28.999...


def nucleus(
    probs: Float[Tensor, "T E"],
    top_p: float,
    min_experts: int = 1,
    max_experts: int | None = None,
    include_crossing: bool = True,
) -> Bool[Tensor, "T E"]:
    """The largest probabilities whose sum reaches ``top_p``, between ``min_experts`` and
    ``max_experts`` of them; without ``include_crossing`` the longest run whose sum stays within it.
    Negative values (noise) count as 0; a sum may exceed ``top_p`` by rounding, 1e-6.
    """
    ordered, order = probs.clamp(min=0).sort(dim=-1, descending=True, stable=True)
    mass = ordered.cumsum(-1)
    kept = F.pad(mass[:, :-1], (1, 0)) < top_p if include_crossing else mass <= top_p + 1e-6
    rank = torch.arange(probs.shape[-1], device=probs.device)
    kept = kept | (rank < min_experts)
    if max_experts is not None:
        kept = kept & (rank < max_experts)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def softmax_over(values: Float[Tensor, "T E"], mask: Bool[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Softmax of the values within the mask, 0 outside. Of logits, it is their full softmax
    renormalised over the mask, also where that has underflowed. Every row needs an expert.
    """
    return values.masked_fill(~mask, -torch.inf).softmax(-1)


def effective_support_size(weights: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
    r""":math:`(\sum_i |w_i|)^2 / \sum_i w_i^2`: 1 for one expert, E for E equal ones
    (Qiu et al., arXiv 2603.10160).
    """
    return weights.abs().sum(-1).square() / weights.square().sum(-1)
