"""Oracle routing: what the last layers' routers could do if they knew the answer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from routerlab.core.checks import within
from routerlab.core.layers import pick_layers
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.routing_vectors import token_positions
from routerlab.test_time.offsets import Offsets, descend, zeros
from routerlab.test_time.plug_in import Cost, Edit
from routerlab.test_time.prompts import distinct, of_rows


class Oracle:
    r"""Routing of the last prompt token by gradient descent on the loss of the right answer, each
    item on its own: :math:`r^* = \arg\min_r CE(f(x, r), y)` (RoMA, arXiv 2511.07419, equation 1).
    IT USES THE ANSWER: an upper bound for analysis and no way to answer.

    What moves are the router logits of the last layers at that token; plain gradient descent, its
    steps and their size are [reconstructed]. The loss is that of the answer's tokens or, where a
    batch has ``choices``, of the right option's first token among those of all options.

    Args:
        num_steps: gradient steps.
        eta: step size.
        layers: the last so many routed layers.
    """

    every: int | None = None
    uses_answer = True

    def __init__(self, num_steps: int = 20, eta: int | float = 1.0, layers: int = 5) -> None:
        within("num_steps", num_steps, 0)
        within("eta", eta, 0)
        self.num_steps, self.eta, self.layers = num_steps, eta, layers
        self.cost = Cost()

    @torch.inference_mode(False)
    def adapt(
        self,
        backbone: Any,
        batch: Mapping[str, Tensor],
        context: RoutingContext,
        previous: Edit | None = None,
    ) -> Offsets:
        """The offsets that make the right answers of the batch likelier. Raises ValueError for a
        batch without ``labels``.
        """
        if "labels" not in batch:
            raise ValueError("labels: the oracle needs the right answers, and the batch has none")
        with self.cost.timed():
            owner, rows = distinct(batch, context)
            if "gold" in batch:  # of each item, the row with its right answer
                gold = batch["gold"].nonzero().flatten()
                rows = torch.empty_like(rows).scatter(0, owner[gold], gold)
            answers = {name: batch[name][rows] for name in ("input_ids", "labels")}
            if "choices" in batch:
                answers["choices"] = batch["choices"][rows]
            offsets = self._tuned(backbone, answers, of_rows(context, rows))
            at, num_tokens = _last_prompt_tokens(context)
            return replace(offsets, owner=owner, at=at, num_tokens=num_tokens)

    def _tuned(
        self, backbone: Any, batch: Mapping[str, Tensor], context: RoutingContext
    ) -> Offsets:
        """Offsets of these rows, each with its right answer."""
        names = pick_layers(backbone.layer_names, self.layers, "layers")
        count = context.batch_size
        owner = torch.arange(count, device=batch["labels"].device)
        start = Offsets(zeros(backbone, names, count), owner, *_last_prompt_tokens(context))
        first = int((batch["labels"] != -100).any(0).int().argmax())
        labels = batch["labels"][:, first:]

        def run() -> tuple[Tensor, Mapping[str, RouterOutput]]:
            out = backbone(batch["input_ids"], context, logits_to_keep=labels.shape[1])
            return answer_losses(out.logits, labels, batch.get("choices")), out.router_outputs

        def shares_of(records: Mapping[str, RouterOutput]) -> dict[str, Tensor]:
            every = next(iter(start.by_layer.values())).new_ones(count)
            return dict.fromkeys(names, every)

        offsets, _ = descend(backbone, start, run, self.num_steps, self.eta, shares_of)
        valid = context.valid
        tokens = batch["input_ids"].numel() if valid is None else int(valid.sum())
        self.cost.add(self.num_steps, tokens, backward=True)
        return offsets


def answer_losses(
    logits: Float[Tensor, "B L V"], labels: Tensor, choices: Tensor | None = None
) -> Float[Tensor, "B"]:
    """The mean loss of each row's targets (``labels`` [B L], -100 is none) in nats; with
    ``choices`` [B C] that of the first target among the tokens of its row (-1 is none).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if choices is None:
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)
    rows = torch.arange(len(labels), device=labels.device)
    place = (labels != -100).int().argmax(1)
    options = logits[rows, place].gather(1, choices.clamp(min=0))
    options = options.masked_fill(choices < 0, -torch.inf)
    right = (choices == labels[rows, place][:, None]).int().argmax(1)
    return F.cross_entropy(options, right, reduction="none")


def _last_prompt_tokens(context: RoutingContext) -> tuple[Tensor, int]:
    return token_positions(context)[:, 0], context.batch_size * context.sequence_length
