"""The load-balancing loss: 1 when experts share the work, E/K when K of them do it all."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from routerlab.core.checks import choice, within
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals, count_experts


class LoadBalancingLoss(nn.Module):
    r""":math:`E \sum_i f_i P_i` of one layer (Fedus et al., arXiv 2101.03961, equations 4-6).

    :math:`f_i` is expert i's share of *all* picks, counted before capacity drops and without
    gradient; :math:`P_i` is the mean of its ``router_probs``, which carries the gradient. Both sum
    to 1, so the value is 1 at perfect balance for every K (transformers and flaxformer report K
    there: divide their coefficient by K, or multiply ours). Padding is in neither.

    ``scope`` says over which tokens f and P are taken:

    - ``global``: the whole optimizer step, all micro-batches and ranks (Qiu et al., arXiv
      2501.11873). Value and gradient do not depend on how the step is cut.
    - ``sequence``: each sequence, then the mean over sequences (DeepSeek-V3, arXiv 2412.19437);
      likewise independent of the cut. With a capacity it counts kept picks only: a record does not
      know whose picks were dropped.
    - ``micro_batch``: the micro-batch of one rank, then the token-weighted mean. The strictest, and
      by its nature dependent on the cut.

    ``counts`` says which picks make f: ``all`` of a token's, or the ``first``, its most probable
    expert (GShard, arXiv 2006.16668; mesh-TensorFlow, and so ST-MoE).

    ``pool_layers`` takes f and P over all layers together, as transformers, MixLoRA and MoLA do:
    layers that lean on different experts then look balanced. MixLoRA's loss (arXiv 2404.15159, its
    code) is K times this value.
    """

    def __init__(
        self,
        weight: float = 0.01,
        scope: str = "global",
        counts: str = "all",
        pool_layers: bool = False,
    ) -> None:
        super().__init__()
        within("weight", weight, 0)
        choice("scope", scope, ("micro_batch", "sequence", "global"))
        choice("counts", counts, ("all", "first"))
        if counts == "first" and scope == "sequence":
            raise ValueError("counts='first' goes with scope='global' or 'micro_batch' only")
        if pool_layers and scope == "sequence":
            raise ValueError(
                "pool_layers=True goes with scope='global' or 'micro_batch' only: a sequence is "
                "one layer's in any case"
            )
        self.weight, self.scope, self.counts = weight, scope, counts
        self.pool_layers = pool_layers
        self.needs_step_sums = scope == "global"

    def step_sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> Float[Tensor, "E"]:
        """Requested assignments of each expert, or tokens that prefer it."""
        counts = output.requests_per_expert
        if self.counts == "first":
            best = output.without_padding(output.router_probs).argmax(-1)
            counts = count_experts(best, output.num_experts)
        return counts.to(output.router_probs.dtype)

    def forward(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """This record's share of the step's loss; without ``totals``, the loss of the record."""
        if totals is None:
            totals = StepTotals.of(output, context, self.step_sums(output, context))
        if self.scope == "sequence":
            picks = output.token_indices, output.expert_indices
            return over_sequences(output, context, *picks) / totals.num_sequences
        counts = totals.sums if self.scope == "global" else self.step_sums(output, context)
        if counts is None:
            raise ValueError("scope='global' needs totals.sums: the step's assignments by expert")
        load = counts / counts.sum().clamp(min=1)
        probs = output.without_padding(output.router_probs).sum(0) / totals.num_tokens
        return output.num_experts * (load * probs).sum()


def over_sequences(
    output: RouterOutput,
    context: RoutingContext | None,
    token_indices: Int[Tensor, "N"],
    expert_indices: Int[Tensor, "N"],
) -> Float[Tensor, ""]:
    r"""The sum over sequences of :math:`E \sum_i f_i P_i`, with f from the given picks of real
    tokens. Without a context there is one sequence.
    """
    num_sequences = 1 if context is None else context.batch_size
    num_experts, probs = output.num_experts, output.router_probs
    length = len(probs) // num_sequences
    cell = (token_indices // length) * num_experts + expert_indices
    counts = count_experts(cell, num_sequences * num_experts).view(num_sequences, num_experts)
    load = counts / counts.sum(1, keepdim=True).clamp(min=1)
    if output.valid is not None:
        probs = torch.where(output.valid[:, None], probs, 0.0)
        tokens = output.valid.view(num_sequences, length).sum(1).clamp(min=1)
    else:
        tokens = torch.full((num_sequences,), length, device=probs.device)
    means = probs.view(num_sequences, length, num_experts).sum(1) / tokens[:, None]
    return num_experts * (load * means).sum()
