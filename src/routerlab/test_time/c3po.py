"""Neighbour mixing: route the end of a prompt as prompts alike are routed that went well."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from routerlab.analysis.neighbour_bank import NeighbourBank
from routerlab.core.checks import within
from routerlab.core.routing import RoutingContext
from routerlab.ops.neighbours import Neighbourhood
from routerlab.ops.routing_vectors import token_positions
from routerlab.test_time.plug_in import Cost, Edit
from routerlab.test_time.prompts import Prompts, moved_to, prompts_of

_BELOW_1 = 0.999  # a sigmoid's largest score
Embed = Callable[[Sequence[str]], Float[Tensor, "n m"]]


class NeighbourMixing:
    r"""Kernel regression on routing, as in C3PO (tianyi-lab/C3PO; described in RoMA, arXiv
    2511.07419): at the last token of each prompt, in the last layers, a router's distribution p
    becomes :math:`(1 - \alpha) p + \alpha \sum_j W_j p_j`, over the prompts j of a bank that are
    nearest in meaning and that the model answered rightly.

    The new logits are the mixture's logarithms, up to a constant: exact where experts are scored by
    a softmax. Sigmoid scores take the mixture's proportions and keep their sum, or as much of it as
    leaves them below 1 [reconstructed]. A prompt without neighbours stays as it is.

    Args:
        alpha: the neighbours' part [reconstructed].
        layers: of the bank that a run makes: the last so many routed ones.
        k, kind, epsilon, sigma, kernel: who is a neighbour, see `Neighbourhood`. The authors' code
            weighs by the cosines themselves.
        bank: a file that `NeighbourBank.save` wrote, for `routerlab eval`; null: one is made of the
            run's model and training items.
    """

    every: int | None = None
    uses_answer = False
    token = "last1"

    def __init__(
        self,
        alpha: int | float = 0.5,
        layers: int = 5,
        kind: str = "knn",
        k: int = 3,
        epsilon: int | float = 0.5,
        sigma: int | float = 0.4,
        kernel: str = "gaussian",
        bank: str | None = None,
    ) -> None:
        within("alpha", alpha, 0, 1)
        self.neighbourhood = Neighbourhood(kind, k, epsilon, sigma, kernel)
        if kind == "random":
            raise ValueError("kind='random': neighbours by lot are a control for training only")
        self.alpha, self.layers, self.bank_file = alpha, layers, bank
        self.cost = Cost()
        self._bank: NeighbourBank | None = None
        self._embed: Embed | None = None

    def use_bank(self, bank: NeighbourBank, embed: Embed) -> None:
        """Takes the prompts to learn from, and what turns texts into vectors like the bank's.

        Raises ValueError for a bank of other tokens, or without a right answer.
        """
        if bank.token != self.token:
            raise ValueError(f"bank: is of token {bank.token!r}; must be of {self.token!r}")
        if not bank.num_correct:
            raise ValueError("bank: no sample in it is answered rightly, so none can be followed")
        self._bank, self._embed = bank, embed

    def adapt(
        self,
        backbone: Any,
        batch: Mapping[str, Tensor],
        context: RoutingContext,
        previous: Edit | None = None,
    ) -> Edit:
        """The mixture with what the neighbours of the batch's prompts do."""
        with self.cost.timed():
            prompts = prompts_of(batch, context)
            wanted, found = self._look_up(backbone, prompts)
        at = token_positions(context, self.token)[:, 0]
        num_tokens = context.batch_size * context.sequence_length
        owner, alpha = prompts.owner, self.alpha * found[:, None]

        def edit(name: str, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
            here = moved_to(at, num_tokens, len(logits)) if name in wanted else None
            if here is None:  # also in passes over generated tokens alone
                return logits
            z = logits.to(torch.promote_types(logits.dtype, torch.float32))
            score_fn = getattr(backbone.moe_layers[name].router, "score_fn", "softmax")
            rows = mixed(z[here], wanted[name][owner].to(z), alpha[owner].to(z), score_fn)
            return z.index_copy(0, here, rows)

        return edit

    def _look_up(self, backbone: Any, prompts: Prompts) -> tuple[dict[str, Tensor], Tensor]:
        """The neighbours' mean distribution of each prompt in each layer of the bank [P E], and
        where there are neighbours [P].
        """
        bank, embed = self._bank, self._embed
        if bank is None or embed is None:
            raise ValueError("bank: there is none; call use_bank first")
        for name, number in bank.layers.items():
            layer = backbone.moe_layers.get(name)
            if layer is None or layer.router.num_experts != number:
                raise ValueError(f"bank: is of a model with {number} experts in {name}; not this")
        embeddings = embed(prompt_texts(backbone, prompts)).to(bank.embeddings)
        weights = self.neighbourhood.weights(embeddings, bank.embeddings, bank.correct)
        means = (weights @ bank.routing).split(list(bank.layers.values()), dim=1)
        device = prompts.owner.device
        wanted = {name: mean.to(device) for name, mean in zip(bank.layers, means, strict=True)}
        return wanted, (weights.sum(1) > 0).to(device)


def mixed(
    logits: Float[Tensor, "B E"],
    neighbours: Float[Tensor, "B E"],
    alpha: Float[Tensor, "B 1"],
    score_fn: str = "softmax",
) -> Float[Tensor, "B E"]:
    """Logits whose distribution is the mixture of theirs with ``neighbours``; where alpha is 0 they
    are what they were.
    """
    smallest = torch.finfo(logits.dtype).tiny
    if score_fn == "softmax":
        share = (1 - alpha) * logits.softmax(-1) + alpha * neighbours
        found = share.clamp(min=smallest).log() + logits.logsumexp(-1, keepdim=True)
    else:
        scores = logits.sigmoid()
        total = scores.sum(-1, keepdim=True).clamp(min=smallest)
        share = (1 - alpha) * scores / total + alpha * neighbours
        largest = share.amax(-1, keepdim=True)
        found = torch.logit(share * torch.minimum(total, _BELOW_1 / largest), eps=1e-6)
    return torch.where(alpha > 0, found, logits)


def prompt_texts(backbone: Any, prompts: Prompts) -> list[str]:
    """What the prompts say. Raises ValueError for a model without a tokenizer."""
    tokenizer = getattr(backbone, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"{type(backbone).__name__} came with no tokenizer, so its prompts cannot be read; use "
            "a pretrained model"
        )
    read = prompts.context.prompt
    if read is None:
        raise ValueError("context.prompt=None: there is no prompt to read")
    masks = read.view(prompts.input_ids.shape)
    rows = [ids[mask].tolist() for ids, mask in zip(prompts.input_ids, masks, strict=True)]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
