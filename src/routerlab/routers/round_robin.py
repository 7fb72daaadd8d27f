"""Round-robin routing: a control with perfect balance."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.forced import forced_choice


class RoundRobin(nn.Module):
    """Real token number t of the micro-batch takes experts ``(t K + j + layer) mod E`` for j < K,
    each with weight 1/K. Padding is skipped in the numbering, so counts differ by 1 at most.

    It has no parameters and learns nothing. It looks at no token, only at how many come before.

    Args:
        d_model: D; not used.
        num_experts: E.
        top_k: K.
    """

    causal = True
    order_dependent = True

    def __init__(self, d_model: int, num_experts: int, top_k: int = 2) -> None:
        super().__init__()
        within("top_k", top_k, 1, num_experts)
        self.num_experts, self.top_k = num_experts, top_k

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of K picks a token; ``router_probs`` are uniform and logits 0."""
        number = torch.arange(len(x), device=x.device)
        layer = 0
        if context is not None:
            layer = context.layer
            if context.valid is not None:
                number = (context.valid.cumsum(0) - 1).clamp(min=0)
        turn = torch.arange(self.top_k, device=x.device)
        picks = (number[:, None] * self.top_k + turn + layer) % self.num_experts
        shape = (len(x), self.num_experts)
        probs = x.new_full(shape, 1 / self.num_experts, dtype=torch.float32)
        return forced_choice(x, picks, probs, context)
