"""Subset sampling: the experts are drawn, their weights are constant, and the choice is learned."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import choice, within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.plackett_luce import ordered_log_prob, sample_ordered
from routerlab.routers.gate import Gate, full_precision


class SubsetSampling(nn.Module):
    r"""K experts drawn without replacement from :math:`q = \mathrm{softmax}(x W^T)`, all with the
    same constant weight (ReMix: Qiu et al., arXiv 2603.10160).

    q never multiplies an expert's output, so the mixture cannot collapse onto one expert. The gate
    learns from the task by policy gradient alone: the record's ``log_prob`` is that of the ordered
    draw, and an objective that sees ``samples = True`` runs each input M times and minimises
    `routerlab.estimators.rloo.rloo_surrogate`. The gate reads detached tokens, so this noisy
    gradient stays in it. Evaluation takes the K most probable experts and draws nothing.

    The paper speaks of "a model input". ``granularity`` [reconstructed] says what that is:

    - ``token``: each token draws its own experts;
    - ``sequence``: one draw a sequence, from the mean of its real tokens. It looks at all of them,
      so it is not ``causal``. The sequence's ``log_prob`` is that of its first real token, and 0
      elsewhere: the choice concerns the losses of all positions.

    Args:
        d_model: D, width of the tokens.
        num_experts: E.
        top_k: K.
        weight: the constant weight (omega) of a chosen expert; null: 1/K.
        granularity: ``token`` or ``sequence``.
        init_std: standard deviation of the gate's initial weights.
    """

    samples = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        weight: float | None = None,
        granularity: str = "token",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        within("top_k", top_k, 1, num_experts)
        choice("granularity", granularity, ("token", "sequence"))
        if weight is not None:
            within("weight", weight, 0, above=True)
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = weight
        self.granularity = granularity
        self.causal = granularity == "token"
        self.gate = Gate(d_model, num_experts, init_std)

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of K picks a token. In training it has ``log_prob``, 0 on padding."""
        valid = None if context is None else context.valid
        num_sequences = 1 if context is None else context.batch_size
        x, log_prob = x.detach(), None
        with full_precision(x):
            pooled = self.granularity == "sequence"
            logits = self.gate(_means(x, num_sequences, valid) if pooled else x)
            if self.training:
                if context is None:
                    raise ValueError("sampling draws from context.seed: pass a RoutingContext")
                draws = context.generator(x.device)
                picks = sample_ordered(logits.detach(), self.top_k, draws)
                log_prob = ordered_log_prob(logits, picks)
            else:
                picks = logits.topk(self.top_k, dim=-1).indices
            if pooled:
                length = len(x) // num_sequences
                logits, picks = (rows.repeat_interleave(length, 0) for rows in (logits, picks))
                log_prob = None if log_prob is None else _at_start(log_prob, length, valid)
            if log_prob is not None and valid is not None:
                log_prob = torch.where(valid, log_prob, 0.0)
            weight = 1 / self.top_k if self.weight is None else self.weight
            weights = torch.full_like(picks, weight, dtype=logits.dtype)
            probs = logits.softmax(-1)
        return RouterOutput.from_top_k(
            logits, probs, picks, weights, valid=valid, log_prob=log_prob
        )


def _means(x: Tensor, num_sequences: int, valid: Tensor | None) -> Tensor:
    """The mean of each sequence's real tokens [B, D]; 0 where it has none."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).view(num_sequences, -1, x.shape[1])
    if valid is None:
        return x.mean(1)
    real = valid.view(num_sequences, -1, 1)
    return torch.where(real, x, 0.0).sum(1) / real.sum(1).clamp(min=1)


def _at_start(of_sequence: Tensor, length: int, valid: Tensor | None) -> Tensor:
    """[T]: each sequence's value at its first real token, 0 at the others."""
    first = torch.zeros_like(of_sequence, dtype=torch.long)
    if valid is not None:
        first = valid.view(-1, length).int().argmax(1)
    placed = of_sequence.new_zeros(len(of_sequence), length)
    return placed.scatter(1, first[:, None], of_sequence[:, None]).reshape(-1)
