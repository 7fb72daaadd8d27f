"""From the losses of a validation to its numbers: nothing is averaged before the end."""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from routerlab.objectives.step import Batch, all_reduce


@runtime_checkable
class Scores(Protocol):
    """What a validation adds up, batch by batch, and what comes of it."""

    def add(self, batch: Batch, logits: Tensor, losses: Tensor, num_targets: Tensor) -> None:
        """Adds a batch: its logits [B, ., V], losses [B, S] in nats and targets a row [B]."""
        ...

    def values(self) -> dict[str, float]:
        """The numbers, over all ranks; ``val/loss`` is one of them."""
        ...


class BitsPerByte:
    """Loss in nats a token and bits per byte, over all and by domain.

    Args:
        domains: names of the labels in ``batch["domain"]``.
        bytes_per_token: of each domain.
        device: where batches are.
    """

    def __init__(
        self, domains: Sequence[str], bytes_per_token: Sequence[float], device: torch.device
    ) -> None:
        self.domains, self.bytes_per_token = domains, bytes_per_token
        self._sums = torch.zeros(len(domains), 2, dtype=torch.float64, device=device)

    def add(self, batch: Batch, logits: Tensor, losses: Tensor, num_targets: Tensor) -> None:
        """Adds a batch."""
        rows = torch.stack([losses.double().sum(1), num_targets.double()], dim=1)
        domain = batch.get("domain", torch.zeros_like(batch["input_ids"][:, 0]))
        self._sums.index_add_(0, domain, rows)

    def values(self) -> dict[str, float]:
        """``val/loss`` and ``val/bits_per_byte``, which is also given for each domain."""
        return bits_per_byte(all_reduce(self._sums), self.domains, self.bytes_per_token)


def bits_per_byte(
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
