"""Top-p routing: as many experts as it takes to gather a given probability."""

from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.selection import nucleus, softmax_over
from routerlab.routers.gate import Gate, full_precision


class TopP(nn.Module):
    r"""The most probable experts until their sum reaches ``top_p``: few where the router is sure,
    many where it is not (Huang et al., arXiv 2403.07652).

    With probabilities :math:`p = \mathrm{softmax}(x W^T)`, the chosen experts have weights
    :math:`p_i`, or :math:`p_i` over their sum with ``normalize_weights``; a token with one expert
    then has the weight 1, without gradient. Nothing bounds the mean number of experts but the
    entropy of p: the paper adds the entropy as a loss.

    Args:
        d_model: D, width of the tokens.
        num_experts: E.
        top_p: probability to gather, above 0 and at most 1.
        min_experts: fewest experts a token.
        max_experts: most experts a token; null: E.
        include_crossing: whether the expert that crosses ``top_p`` is used. False stops before it
            (Li et al., DynMoLE, arXiv 2504.00661), so the gathered sum stays at ``top_p`` or less.
        normalize_weights: divide the weights by their sum.
        init_std: standard deviation of the gate's initial weights.
    """

    causal = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_p: float = 0.4,
        min_experts: int = 1,
        max_experts: int | None = None,
        include_crossing: bool = True,
        normalize_weights: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        within("top_p", top_p, 0, 1, above=True)
        within("min_experts", min_experts, 1, num_experts)
        if max_experts is not None:
            within("max_experts", max_experts, min_experts, num_experts)
        self.num_experts, self.top_p = num_experts, top_p
        self.min_experts, self.max_experts = min_experts, max_experts
        self.include_crossing, self.normalize_weights = include_crossing, normalize_weights
        self.gate = Gate(d_model, num_experts, init_std)

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of any number of picks a token, at least ``min_experts``."""
        valid = None if context is None else context.valid
        with full_precision(x):
            logits = self.gate(x)
            probs = logits.softmax(-1)
            mask = nucleus(
                probs.detach(),
                self.top_p,
                self.min_experts,
                self.max_experts,
                self.include_crossing,
            )
            weights = softmax_over(logits, mask) if self.normalize_weights else probs
        return RouterOutput.from_dispatch_mask(logits, probs, mask, weights, valid=valid)
