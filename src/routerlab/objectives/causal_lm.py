"""Next-token prediction."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.objectives.routed import Batch, RoutedObjective


class CausalLM(RoutedObjective):
    """Cross-entropy of the next token: ``labels[b, s]`` follows ``input_ids[b, s]``; -100 is none.

    Routers that look across tokens in evaluation (``causal = False``) leak the future into the
    prediction: their numbers are not those of a language model. They are refused, unless
    ``allow_noncausal``; summaries, tables and reports then mark the run. Those that look ahead in
    training only are taken, and marked as well (see `objectives.lookahead`). The other arguments
    are those of `RoutedObjective`.
    """

    def __init__(
        self, backbone: nn.Module, *, allow_noncausal: bool = False, **shared: Any
    ) -> None:
        super().__init__(backbone, **shared)
        if self.looks_ahead == "in evaluation" and not allow_noncausal:
            names = [n for n, m in backbone.named_modules() if not getattr(m, "causal", True)]
            raise ValueError(
                f"{min(names, default='a router under its schedule')} looks at other tokens "
                "(causal=False) and would leak the future; choose another router, or set "
                "objective.allow_noncausal=true: the results are then marked as leaking"
            )

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy [B, S] in nats; 0 where there is no target."""
        labels = batch["labels"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        losses = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="none")
        return losses.view(labels.shape)
