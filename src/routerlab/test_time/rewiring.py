"""Rewiring: router logits tuned on each prompt by its own next-token loss."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from routerlab.core.checks import choice, within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.test_time.layer_scores import SCORES, SELECTIONS, layer_scores, layer_shares
from routerlab.test_time.offsets import Offsets, descend, zeros
from routerlab.test_time.plug_in import Cost, Edit
from routerlab.test_time.prompts import Prompts, prompts_of


@dataclass(frozen=True, slots=True, eq=False)
class Phase:
    """One adaptation to P prompts: their loss before each of n steps, the score of each layer and
    its share of the gradient (both 0 where n is 0), and the offsets that came out.
    """

    losses: Float[Tensor, "n P"]
    scores: Float[Tensor, "P L"]
    shares: Float[Tensor, "P L"]
    offsets: Offsets


class Rewiring:
    r"""Rerouting by gradient descent on additive logits (Su et al., arXiv 2510.14853).

    One vector :math:`\delta^l` a layer and sequence is added to the router logits of all its
    positions, and for ``num_steps`` steps follows the gradient of the prompt's next-token loss,
    :math:`\delta^l \leftarrow \delta^l - \eta w_l\, \partial L / \partial \delta^l`, from 0 and
    through frozen weights. It is then used for what follows the prompt, and forgotten. A prompt of
    one token has no target and keeps 0. Rows of one item share a prompt, which is read once.

    [reconstructed]: plain gradient descent, ``layer_share``, the form of ``soft``, means over the
    prompt's tokens in the scores, the choice of layers in the first pass of a phase for all of it,
    and offsets that go on from phase to phase of a generation.

    Args:
        num_steps: gradient steps of a phase; 0 changes nothing.
        eta: step size.
        selection: which layers follow their gradient: ``hard`` (those of the highest scores),
            ``soft`` (all, weighted by their scores) or ``all``.
        score: of layers, see `layer_scores`.
        layer_share: r, the share of layers that ``hard`` selects.
        every: generated tokens between two phases.
        reset_each_phase: start each phase from 0.
        seed: of random scores.

    Attributes:
        phase: what the last adaptation did; None before the first.
    """

    uses_answer = False

    def __init__(
        self,
        num_steps: int = 5,
        eta: int | float = 0.05,
        selection: str = "hard",
        score: str = "confidence",
        layer_share: int | float = 0.5,
        every: int = 128,
        reset_each_phase: bool = False,
        seed: int = 0,
    ) -> None:
        within("num_steps", num_steps, 0)
        within("eta", eta, 0)
        choice("selection", selection, SELECTIONS)
        choice("score", score, SCORES)
        within("layer_share", layer_share, 0, 1, above=True)
        within("every", every, 1)
        if selection == "soft" and score == "negative_entropy":
            raise ValueError(
                "score='negative_entropy': is below 0, so selection='soft' would turn it around; "
                "use selection='hard'"
            )
        self.num_steps, self.eta = num_steps, eta
        self.selection, self.score, self.layer_share = selection, score, layer_share
        self.every: int | None = every
        self.reset_each_phase, self.seed = reset_each_phase, seed
        self.cost = Cost()
        self.phase: Phase | None = None

    @torch.inference_mode(False)
    def adapt(
        self,
        backbone: Any,
        batch: Mapping[str, Tensor],
        context: RoutingContext,
        previous: Edit | None = None,
    ) -> Offsets:
        """The offsets that lower the loss of the batch's prompts."""
        with self.cost.timed():
            prompts = prompts_of(batch, context)
            count = len(prompts.first)
            start = zeros(backbone, backbone.layer_names, count)
            if isinstance(previous, Offsets) and not self.reset_each_phase:
                start = previous.by_layer
            rows = torch.arange(count, device=prompts.owner.device)
            self.phase = self._tuned(backbone, prompts, Offsets(start, rows))
            return replace(self.phase.offsets, owner=prompts.owner)

    def _tuned(self, backbone: Any, prompts: Prompts, offsets: Offsets) -> Phase:
        """A phase that starts from these offsets."""
        first = next(iter(offsets.by_layer.values()))
        scores = first.new_zeros(len(first), len(offsets.by_layer))
        shares = scores

        def run() -> tuple[Tensor, Mapping[str, RouterOutput]]:
            out = backbone(prompts.input_ids, prompts.context)
            return prompt_losses(out.logits, prompts), out.router_outputs

        def shares_of(records: Mapping[str, RouterOutput]) -> dict[str, Tensor]:
            nonlocal scores, shares
            scores = layer_scores(self.score, records, prompts.context, self.seed)
            shares = layer_shares(self.selection, scores, self.layer_share)
            return dict(zip(records, shares.unbind(1), strict=True))

        offsets, losses = descend(backbone, offsets, run, self.num_steps, self.eta, shares_of)
        valid = prompts.context.valid
        tokens = prompts.input_ids.numel() if valid is None else int(valid.sum())
        self.cost.add(self.num_steps, tokens, backward=True)
        return Phase(losses, scores, shares, offsets)


def prompt_losses(logits: Float[Tensor, "P S V"], prompts: Prompts) -> Float[Tensor, "P"]:
    """The mean next-token loss of each prompt in nats, over its own targets; 0 without any."""
    targets = prompts.input_ids[:, 1:]
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    losses = losses.view(targets.shape)
    if prompts.context.valid is None:
        return losses.sum(1) / max(targets.shape[1], 1)
    wanted = prompts.context.valid.view(prompts.input_ids.shape)[:, 1:]
    return torch.where(wanted, losses, 0.0).sum(1) / wanted.sum(1).clamp(min=1)
