"""Answers to questions, right or wrong: counted over a validation."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from routerlab.objectives.step import Batch, all_reduce

_Z = 1.959964  # two-sided 95 %


class AnswerScores:
    """Accuracy over all items and by task, with an interval, and the loss of the right answers.

    A batch has one row an option: ``item`` [B] numbers its items, ``gold`` [B] marks right answers,
    ``chooses`` [B] says whether the item is multiple choice, ``task`` [B] is its task. Rows of
    right answers are enough where the first token decides; these have ``choices`` [B, C].

    Args:
        tasks: names of the labels in ``batch["task"]``.
        option_score: an option's score is the ``sum`` of its tokens' log-likelihoods, their
            ``mean``, or that of its ``first_token``.
        device: where batches are.
    """

    def __init__(self, tasks: Sequence[str], option_score: str, device: torch.device) -> None:
        self.tasks, self.option_score = tasks, option_score
        self._counts = torch.zeros(len(tasks), 2, dtype=torch.float64, device=device)  # right, all
        self._losses = torch.zeros(2, 2, dtype=torch.float64, device=device)  # nats, tokens

    def add(self, batch: Batch, logits: Tensor, losses: Tensor, num_targets: Tensor) -> None:
        """Adds a batch: logits [B, L, V] of its last L positions, losses [B, S] in nats."""
        right, row = self._judged(batch, logits, losses, num_targets)
        rows = torch.stack([right, torch.ones_like(right)], dim=1).double()
        self._counts.index_add_(0, batch["task"][row], rows)
        self._add_losses(0, losses[batch["gold"]], num_targets[batch["gold"]])

    def _judged(
        self, batch: Batch, logits: Tensor, losses: Tensor, num_targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Whether each item is answered rightly, and a row of it."""
        if self.option_score == "first_token":
            right = first_token_right(logits, batch["labels"], batch["choices"])
            return right[batch["gold"]], batch["gold"].nonzero().flatten()
        nats = losses.double().sum(1)
        scores = -nats / num_targets.clamp(min=1) if self.option_score == "mean" else -nats
        matches = exact_matches(logits, batch["labels"])
        return right_items(scores, matches, batch["item"], batch["gold"], batch["chooses"])

    def add_sampled(self, losses: Tensor, num_targets: Tensor) -> None:
        """Adds right answers, routed by sampling."""
        self._add_losses(1, losses, num_targets)

    def _add_losses(self, kind: int, losses: Tensor, num_targets: Tensor) -> None:
        self._losses[kind] += torch.stack([losses.double().sum(), num_targets.sum().double()])

    def values(self) -> dict[str, float]:
        """``val/loss``, ``val/sampled_loss``, ``val/accuracy`` with the ends ``_low`` and ``_high``
        of its 95 % interval, ``val/items``; accuracy and items also by task.
        """
        flat = all_reduce(torch.cat([self._counts.flatten(), self._losses.flatten()])).cpu()
        counts, losses = flat[:-4].view(-1, 2), flat[-4:].view(2, 2).tolist()
        scalars = {"val/loss": losses[0][0] / max(losses[0][1], 1.0)}
        if losses[1][1]:
            scalars["val/sampled_loss"] = losses[1][0] / losses[1][1]
        right, items = counts.sum(0).tolist()
        scalars["val/items"] = items
        if items:
            low, high = wilson_interval(right, items)
            scalars |= {"val/accuracy": right / items}
            scalars |= {"val/accuracy_low": low, "val/accuracy_high": high}
        for task, (good, count) in zip(self.tasks, counts.tolist(), strict=True):
            if count:
                scalars[f"val/accuracy/{task}"] = good / count
                scalars[f"val/items/{task}"] = count
        return scalars


def exact_matches(logits: Float[Tensor, "B L V"], labels: Int[Tensor, "B S"]) -> Bool[Tensor, "B"]:
    """Whether greedy generation gives the row's answer, token by token: by induction it does where
    the likeliest token after each true prefix is the label. Logits are of the last L positions,
    which hold all labels that are not -100.
    """
    labels = labels[:, labels.shape[1] - logits.shape[1] :]
    return ((logits.argmax(-1) == labels) | (labels == -100)).all(1)


def option_logits(
    logits: Float[Tensor, "B L V"], labels: Int[Tensor, "B S"], choices: Int[Tensor, "B C"]
) -> tuple[Float[Tensor, "B C"], Int[Tensor, "B"]]:
    """The logits of each option's first token at the last position of the prompt, -inf where
    ``choices`` has -1, and the number of the right option. Logits are of the last L positions.
    """
    labels = labels[:, labels.shape[1] - logits.shape[1] :]
    rows = torch.arange(len(labels), device=labels.device)
    place = (labels != -100).int().argmax(1)  # the first target is what follows the prompt
    at_place = logits[rows, place]
    found = at_place.to(torch.promote_types(at_place.dtype, torch.float32))
    found = found.gather(1, choices.clamp(min=0)).masked_fill(choices < 0, -torch.inf)
    return found, (choices == labels[rows, place][:, None]).int().argmax(1)


def first_token_right(
    logits: Float[Tensor, "B L V"], labels: Int[Tensor, "B S"], choices: Int[Tensor, "B C"]
) -> Bool[Tensor, "B"]:
    """Whether the right option's first token has the highest logit of all options (the first of
    equals counts).
    """
    scores, gold = option_logits(logits, labels, choices)
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best, pick = scores.max(1)
    return (pick == gold) & (best > -torch.inf)


def right_items(
    scores: Float[Tensor, "B"],
    matches: Bool[Tensor, "B"],
    item: Int[Tensor, "B"],
    gold: Bool[Tensor, "B"],
    chooses: Bool[Tensor, "B"],
) -> tuple[Bool[Tensor, "I"], Int[Tensor, "I"]]:
    """Whether each item is answered rightly, and its first row.

    Multiple choice: the option with the highest score (the first of equals) is a right answer.
    Otherwise the item's only row must be matched exactly.
    """
    names, item = item.unique(return_inverse=True)
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    size, rows = len(names), torch.arange(len(item), device=item.device)
    best = scores.new_full((size,), -torch.inf).scatter_reduce(0, item, scores, "amax")
    none = rows.new_full((size,), len(rows))
    first = none.scatter_reduce(0, item, rows, "amin")
    of_best = torch.where(scores == best[item], rows, len(rows))
    picked = none.scatter_reduce(0, item, of_best, "amin")
    known = scores[picked] > -torch.inf  # a model that says nan is not right by chance
    return gold[picked] & known & (chooses[picked] | matches[picked]), first


def wilson_interval(right: int | float, items: int | float) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927): right also near 0 and 1 and for few items."""
    share, spread = right / items, _Z**2 / items
    middle = share + spread / 2
    width = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = (middle - width) / (1 + spread), (middle + width) / (1 + spread)
    return max(0.0, low), min(1.0, high)
