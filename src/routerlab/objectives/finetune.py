"""Supervised fine-tuning: the loss counts answers, and a validation counts right ones."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.backbones.decoder import BackboneOutput
from routerlab.core.checks import choice
from routerlab.core.routing import RoutingContext
from routerlab.objectives.answers import (
    AnswerScores,
    exact_matches,
    first_token_right,
    option_logits,
)
from routerlab.objectives.lookahead import refuse_lookahead
from routerlab.objectives.routed import RoutedObjective
from routerlab.objectives.step import Batch


class FineTune(RoutedObjective):
    """Cross-entropy of answer tokens after a prompt.

    A batch is padded on the left: ``input_ids`` [B, S]; ``labels`` [B, S], the token that follows,
    -100 where it is no answer; ``valid`` [B, S], False on padding; ``prompt`` [B, S]; ``task`` and
    ``domain`` [B]; ``sample`` [B], the item's number among those to train on, or -1; perhaps
    ``choices`` [B, C], first tokens of the item's options, -1 after the last. In validation its
    rows are options of items (`objectives.answers`). Generated answers are right where greedy
    generation would give them token by token, which one forward pass tells. Where routers sample
    their choice, ``val/sampled_loss`` is the loss of the right answers under sampled choices,
    beside ``val/loss`` under the choices of evaluation.

    The prompt is told, so routers that pool nothing but the prompt are causal here. Others that
    look ahead are refused, as in `CausalLM`, unless ``allow_noncausal``.

    Args:
        backbone: ``(input_ids, context, logits_to_keep=) -> BackboneOutput``; it is asked for the
            logits of the last positions that hold all answers.
        option_score: of multiple choice: ``sum`` or ``mean`` of the tokens' log-likelihoods, or
            that of the ``first_token``, for which one row an item is enough.
        loss_on: the tokens of the ``answer``, or ``choices``: which of the options' first tokens
            follows the prompt, one target a row (as in the released code of RoMA, arXiv
            2511.07419).

    ``domains`` are the names of the tasks; the other arguments are those of `RoutedObjective`.
    """

    gives_prompt = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        allow_noncausal: bool = False,
        option_score: str = "sum",
        loss_on: str = "answer",
        **shared: Any,
    ) -> None:
        super().__init__(backbone, **shared)
        choice("option_score", option_score, ("sum", "mean", "first_token"))
        choice("loss_on", loss_on, ("answer", "choices"))
        refuse_lookahead(backbone, self.looks_ahead, allow_noncausal, self.gives_prompt)
        self.option_score, self.loss_on = option_score, loss_on

    @property
    def needs_choices(self) -> list[str]:
        """The settings for which every batch must have ``choices``."""
        settings = {"option_score": "first_token", "loss_on": "choices"}
        return [f"{name}={x}" for name, x in settings.items() if getattr(self, name) == x]

    def run(self, batch: Batch, context: RoutingContext) -> BackboneOutput:
        """Records of a batch, and logits [B, L, V] of the last L positions."""
        keep = answer_columns(batch["labels"])
        return self.backbone(batch["input_ids"], context, logits_to_keep=keep)

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy [B, S] in nats from logits [B, L, V]; 0 where there is no target."""
        labels = batch["labels"]
        kept = labels[:, labels.shape[1] - logits.shape[1] :]
        wanted = kept != -100
        if self.loss_on == "choices":
            wanted = wanted & (wanted.cumsum(1) == 1)  # what follows the prompt
            chosen, target = option_logits(logits, labels, batch["choices"])
            chosen, target = chosen[wanted.any(1)], target[wanted.any(1)]
        else:
            chosen, target = logits[wanted], kept[wanted]
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        losses = chosen.new_zeros(kept.shape).masked_scatter(
            wanted, F.cross_entropy(chosen, target, reduction="none")
        )
        return F.pad(losses, (labels.shape[1] - kept.shape[1], 0))

    def num_targets(self, batch: Batch) -> Tensor:
        """Targets a row [B]."""
        counts = super().num_targets(batch)
        return counts.clamp(max=1) if self.loss_on == "choices" else counts

    def correct(self, logits: Tensor, batch: Batch) -> Tensor:
        """Whether the model is right about each row [B], all of which hold right answers: by its
        first token where that is the score of options, else by what it would generate.
        """
        if self.option_score == "first_token":
            return first_token_right(logits, batch["labels"], batch["choices"])
        return exact_matches(logits, batch["labels"])

    def validation_scores(self) -> AnswerScores:
        """Accuracy and loss of the right answers."""
        return AnswerScores(self.domains, self.option_score, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the sums, and its right answers once more under sampled choices."""
        super().validation_step(batch, batch_idx)
        if not self.policy or not batch["gold"].any():
            return
        gold = {key: value[batch["gold"]] for key, value in batch.items()}
        routers = [r for r in self._routers().values() if getattr(r, "samples", False)]
        modes = [router.training for router in routers]
        for router in routers:
            router.train()
        with torch.no_grad():
            context = self.context(gold, self._steps_taken, batch_idx)
            losses = self.task_loss(self.run(gold, context).logits, gold)
        for router, mode in zip(routers, modes, strict=True):
            router.train(mode)
        scores: Any = self._scores
        scores.add_sampled(losses, self.num_targets(gold))

    def example(self, length: int) -> Batch:
        """Two sequences of token numbers 0 and 1: a prompt and an answer of the first task."""
        batch = super().example(length)
        ids = batch["input_ids"]
        prompt = (torch.arange(length) < length - length // 2).expand_as(ids)
        batch |= {"labels": ids.masked_fill(prompt, -100), "prompt": prompt}
        batch |= {"valid": torch.ones_like(prompt), "task": batch["domain"].clone()}
        batch |= {"choices": torch.arange(2).expand(2, 2), "sample": torch.full((2,), -1)}
        return batch


def answer_columns(labels: Tensor) -> int:
    """Number of columns from the first that holds a target to the end of [B, S]; at least 1."""
    columns = (labels != -100).any(0).nonzero()
    return labels.shape[1] - int(columns[0]) if len(columns) else 1
