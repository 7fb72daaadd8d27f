"""Subset sampling: the experts are drawn, their weights are constant, and the choice is learned."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import choice, within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.plackett_luce import ordered_log_prob, sample_ordered
from routerlab.ops.prompt_mean import prompt_mean
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
    - ``sequence``: one draw a sequence, from the mean of its prompt's tokens (of all its real
      tokens where the context tells no prompt), or from ``context.sequence_embedding`` where there
      is one. It looks at all of them, so it is not ``causal``, but ``reads_prompt_only``: where
      prompts are told it leaks nothing of what follows them. The sequence's ``log_prob`` is that of
      its first real token, and 0 elsewhere: the choice concerns the losses of all positions.

    The M runs of an input come as blocks of a batch (``context.num_replicas``) or one by one
    (``context.replica``) and draw the same either way. In training the gate builds its graph even
    where gradients are off: a run can be there for its choice and its loss alone.

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
        self.reads_prompt_only = granularity == "sequence"
        self.gate = Gate(d_model, num_experts, init_std)

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of K picks a token. In training it has ``log_prob``, 0 on padding."""
        valid = None if context is None else context.valid
        x, log_prob = x.detach(), None
        learns = self.training and not torch.is_inference_mode_enabled()
        with full_precision(x), torch.set_grad_enabled(learns or torch.is_grad_enabled()):
            pooled = self.granularity == "sequence"
            logits = self.gate(_sequences(x, context) if pooled else x)
            if self.training:
                if context is None:
                    raise ValueError("sampling draws from context.seed: pass a RoutingContext")
                picks = _draw(logits.detach(), self.top_k, context)
                log_prob = ordered_log_prob(logits, picks)
            else:
                picks = logits.topk(self.top_k, dim=-1).indices
            if pooled:
                length = len(x) // len(logits)
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


def _draw(logits: Tensor, top_k: int, context: RoutingContext) -> Tensor:
    """[T, K], each block of samples from its own generator."""
    draws = context.generators(logits.device)
    blocks = logits.tensor_split(len(draws))
    picks = [
        sample_ordered(*each) for each in zip(blocks, [top_k] * len(draws), draws, strict=True)
    ]
    return torch.cat(picks)


def _sequences(x: Tensor, context: RoutingContext | None) -> Tensor:
    """[B, D]: what stands for each sequence."""
    if context is not None and context.sequence_embedding is not None:
        return context.sequence_embedding.detach()
    return prompt_mean(x, context)


def _at_start(of_sequence: Tensor, length: int, valid: Tensor | None) -> Tensor:
    """[T]: each sequence's value at its first real token, 0 at the others."""
    first = torch.zeros_like(of_sequence, dtype=torch.long)
    if valid is not None:
        first = valid.view(-1, length).int().argmax(1)
    placed = of_sequence.new_zeros(len(of_sequence), length)
    return placed.scatter(1, first[:, None], of_sequence[:, None]).reshape(-1)
