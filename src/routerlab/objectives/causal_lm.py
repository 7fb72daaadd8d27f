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
    training only are taken, and marked as well (see `looks_ahead`). The other arguments are those
    of `RoutedObjective`.
    """

    def __init__(
        self, backbone: nn.Module, *, allow_noncausal: bool = False, **shared: Any
    ) -> None:
        super().__init__(backbone, **shared)
        leaking = sorted(
            name for name, module in backbone.named_modules() if not getattr(module, "causal", True)
        )
        if leaking and not allow_noncausal:
            raise ValueError(
                f"{leaking[0]} looks at other tokens (causal=False) and would leak the future; "
                "choose another router, or set objective.allow_noncausal=true: the results are "
                "then marked as leaking"
            )

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy [B, S] in nats; 0 where there is no target."""
        labels = batch["labels"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        losses = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="none")
        return losses.view(labels.shape)


def looks_ahead(backbone: nn.Module) -> str:
    """Whether a token's routing depends on later tokens: ``no``, ``in training`` (evaluation is
    clean) or ``in evaluation``, which makes its language-modelling numbers worthless.
    """
    modules = list(backbone.modules())
    if not all(getattr(module, "causal", True) for module in modules):
        return "in evaluation"
    if not all(getattr(module, "causal_training", True) for module in modules):
        return "in training"
    return "no"
