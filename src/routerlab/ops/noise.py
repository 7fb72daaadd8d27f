"""Noisy top-k: learned Gaussian noise on the logits, and what it makes of the choice."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def noisy_logits(
    logits: Float[Tensor, "T E"], raw_std: Float[Tensor, "T E"], generator: torch.Generator
) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
    """``logits + N(0, 1) * std`` and the standard deviations ``softplus(raw_std) + 0.01``
    (Shazeer et al., arXiv 1701.06538, equation 4; the floor is tensor2tensor's).
    """
    std = F.softplus(raw_std) + 1e-2
    normal = torch.randn(
        logits.shape, generator=generator, dtype=logits.dtype, device=logits.device
    )
    return logits + normal * std, std


def selection_probability(
    logits: Float[Tensor, "T E"],
    noisy: Float[Tensor, "T E"],
    std: Float[Tensor, "T E"],
    top_k: int,
) -> Float[Tensor, "T E"]:
    r"""Chance that an expert is among the K best if its own noise is drawn again
    (arXiv 1701.06538, appendix A): :math:`\Phi((z_i - \theta_i) / \sigma_i)` with
    :math:`\theta_i` the K-th largest of the other noisy logits. All ones for K = E.
    """
    if top_k == logits.shape[-1]:
        return torch.ones_like(logits)
    best = noisy.topk(top_k + 1, dim=-1).values
    if_in, if_out = best[:, top_k, None], best[:, top_k - 1, None]
    others = torch.where(noisy > if_in, if_in, if_out)
    return torch.special.ndtr((logits - others) / std)
