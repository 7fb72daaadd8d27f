"""From summed losses to the numbers of a validation."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def validation_scalars(
    sums: Float[Tensor, "domains 2"], domains: Sequence[str], bytes_per_token: Sequence[float]
) -> dict[str, float]:
    """``val/loss`` in nats a token and ``val/bits_per_byte``, over all and by domain, from each
    domain's summed loss in nats and number of tokens. A domain without tokens is left out.
    """
    loss, count = sums.cpu().unbind(1)
    bytes_seen = count * torch.tensor(bytes_per_token, dtype=torch.float64)
    bits = loss / math.log(2)
    scalars = {"val/loss": float(loss.sum() / count.sum().clamp(min=1))}
    scalars["val/bits_per_byte"] = float(bits.sum() / bytes_seen.sum().clamp(min=1))
    for name, b, n in zip(domains, bits, bytes_seen, strict=True):
        if n:
            scalars[f"val/bits_per_byte/{name}"] = float(b / n)
    return scalars
