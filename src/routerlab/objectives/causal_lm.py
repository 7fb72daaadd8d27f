"""Next-token prediction."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.objectives.lookahead import refuse_lookahead
from routerlab.objectives.routed import RoutedObjective
from routerlab.objectives.step import Batch
from routerlab.objectives.validation import BitsPerByte


class CausalLM(RoutedObjective):
    """Cross-entropy of the next token: ``labels[b, s]`` follows ``input_ids[b, s]``; -100 is none.

    Routers that look across tokens in evaluation (``causal = False``) leak the future into the
    prediction: their numbers are not those of a language model. They are refused, unless
    ``allow_noncausal``; summaries, tables and reports then mark the run. Those that look ahead in
    training only are taken, and marked as well (see `objectives.lookahead`).

    Args:
        bytes_per_token: of each domain, to report bits per byte (in training: of their mean).

    The other arguments are those of `RoutedObjective`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        allow_noncausal: bool = False,
        bytes_per_token: list[float] | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(backbone, **shared)
        if bytes_per_token and len(bytes_per_token) != len(self.domains):
            raise ValueError(f"bytes_per_token={bytes_per_token}: one for each of {self.domains}")
        refuse_lookahead(backbone, self.looks_ahead, allow_noncausal)
        self.bytes_per_token = bytes_per_token or [1.0] * len(self.domains)
        self._bytes_per_token = sum(self.bytes_per_token) / len(self.bytes_per_token)

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy [B, S] in nats; 0 where there is no target."""
        labels = batch["labels"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        losses = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="none")
        return losses.view(labels.shape)

    def task_scalars(self, task: float) -> dict[str, float]:
        """The step's loss in bits per byte."""
        return {"train/bits_per_byte": task / math.log(2) / self._bytes_per_token}

    def validation_scores(self) -> BitsPerByte:
        """Loss and bits per byte, over all and by domain."""
        return BitsPerByte(self.domains, self.bytes_per_token, self.device)
