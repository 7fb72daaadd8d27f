"""Entropies of distributions over experts: Shannon's, Tsallis' and Renyi's."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

_SHANNON = 0.01  # this close to 1, eps over (q - 1) would outweigh the entropy


def entropy(probs: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy in nats, with a finite gradient also where a probability is 0 (that of
    `torch.special.entr` is infinite there, and NaN once it passes a softmax).
    """
    smallest = torch.finfo(probs.dtype).tiny
    return -(probs * probs.clamp(min=smallest).log()).sum(-1)


def tsallis_entropy(
    probs: Float[Tensor, "*batch E"], entropic_index: float = 1.1, eps: float = 1e-5
) -> Float[Tensor, "*batch"]:
    r"""Tsallis entropy :math:`(1 - \sum_i (p_i + \epsilon)^q) / (q - 1)` over that of the uniform
    distribution, with a finite gradient at p = 0. Within 0.01 of 1, q is taken as 1: Shannon's.
    """
    q, num_experts = entropic_index, max(probs.shape[-1], 2)
    if abs(q - 1) < _SHANNON:
        return entropy(probs + eps) / math.log(num_experts)
    return (1 - _power_sum(probs + eps, q)) / (1 - num_experts ** (1 - q))


def renyi_entropy(
    probs: Float[Tensor, "*batch E"], entropic_index: float = 1.1, eps: float = 1e-5
) -> Float[Tensor, "*batch"]:
    r"""Renyi entropy :math:`\ln \sum_i (p_i + \epsilon)^a / (1 - a)` over that of the uniform
    distribution, :math:`\ln E`. Within 0.01 of 1, a is taken as 1: Shannon's.
    """
    a, largest = entropic_index, math.log(max(probs.shape[-1], 2))
    if abs(a - 1) < _SHANNON:
        return entropy(probs + eps) / largest
    return _power_sum(probs + eps, a).log() / ((1 - a) * largest)


def _power_sum(values: Float[Tensor, "*batch E"], power: float) -> Float[Tensor, "*batch"]:
    powers = values.clamp(min=torch.finfo(values.dtype).tiny).pow(power - 1)
    return (values * powers).sum(-1)
