"""DeepSeek-V3's sequence-wise balance loss: no single sequence may lean on few experts."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.losses.load_balancing import over_sequences


class SequenceBalanceLoss(nn.Module):
    r"""The mean over sequences of :math:`\sum_i f_i P_i` of one layer (DeepSeek-V3, arXiv
    2412.19437, equations 17-20), with T the tokens of the sequence and

    .. math:: f_i = \frac{E}{K T} \sum_t 1[i \in \mathrm{topk}(s_t)], \quad
              P_i = \frac{1}{T} \sum_t \frac{s_{t,i}}{\sum_j s_{t,j}}.

    f counts the top K of the *unbiased* scores, in the order of ``router_logits``: not what a
    bias, a group limit or a capacity made of them. That is the difference to
    ``load_balancing`` with ``scope="sequence"``, which counts the picks. f has no gradient; P is
    ``router_probs``. 1 at balance. Padding is in neither, nor a sequence of padding alone.

    Args:
        weight: of the loss.
        top_k: K; None takes the record's number of picks per real token.

    Raises:
        ValueError: K is None and the record has no whole number of picks per token, or K > E.
    """

    needs_step_sums = False

    def __init__(self, weight: float = 1e-4, top_k: int | None = None) -> None:
        super().__init__()
        within("weight", weight, 0)
        if top_k is not None:
            within("top_k", top_k, 1)
        self.weight, self.top_k = weight, top_k

    def forward(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """This record's share of the step's loss; without ``totals``, the loss of the record."""
        totals = StepTotals.of(output, context) if totals is None else totals
        tokens = torch.arange(len(output.router_logits), device=output.router_logits.device)
        tokens = output.without_padding(tokens)
        logits = output.without_padding(output.router_logits)
        experts = logits.topk(self._picks_per_token(output, len(tokens)), dim=-1).indices
        picks = tokens[:, None].expand_as(experts).reshape(-1), experts.reshape(-1)
        return over_sequences(output, context, *picks) / totals.num_sequences

    def _picks_per_token(self, output: RouterOutput, num_tokens: int) -> int:
        if self.top_k is not None:
            within("top_k", self.top_k, 1, output.num_experts)
            return self.top_k
        if output.top_k is not None:
            return output.top_k
        requests = int(output.requests_per_expert.sum())
        top_k, rest = divmod(requests, max(num_tokens, 1))
        if rest:
            raise ValueError(
                f"sequence_balance with top_k=None: the record has {requests} picks of "
                f"{num_tokens} tokens, no whole number each; set top_k"
            )
        return top_k
