"""Ordered samples without replacement: the Plackett-Luce law of K experts a token."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sample_ordered(
    logits: Float[Tensor, "T E"], top_k: int, generator: torch.Generator
) -> Int[Tensor, "T K"]:
    """K distinct experts, drawn one after the other with probability proportional to
    ``exp(logits)`` among those left: the K largest logits plus Gumbel noise, in their order.
    """
    noise = torch.empty_like(logits).exponential_(generator=generator)
    gumbel = -noise.clamp(min=torch.finfo(logits.dtype).tiny).log()
    return (logits + gumbel).topk(top_k, dim=-1).indices


def ordered_log_prob(
    logits: Float[Tensor, "T E"], expert_indices: Int[Tensor, "T K"]
) -> Float[Tensor, "T"]:
    r"""The log-probability of each row's ordered draw,

    .. math:: \log Q = \sum_j \Big( z_{i_j} - \log \sum_{i \text{ not yet drawn}} e^{z_i} \Big).

    The sums run over what is left, never as one minus what was drawn, which cancels to 0 where the
    distribution is peaked.
    """
    total = torch.zeros_like(logits[:, 0])
    drawn = torch.zeros_like(logits, dtype=torch.bool)
    for pick in expert_indices.split(1, dim=-1):
        left = logits.masked_fill(drawn, -torch.inf).logsumexp(-1)
        total = total + logits.gather(-1, pick).squeeze(-1) - left
        drawn = drawn.scatter(-1, pick, True)
    return total
