"""Random routing: a control that ignores the tokens."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.forced import forced_choice


class RandomRouter(nn.Module):
    """K distinct experts a token, uniformly and anew in every forward pass, each with weight 1/K
    (Zuo et al., THOR, arXiv 2110.04260, without its consistency loss).

    It has no parameters and learns nothing; it is random in evaluation too. Draws are a function of
    ``context.seed``, the layer and the place in the batch.

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
        if context is None:
            raise ValueError("random routing draws from context.seed: pass a RoutingContext")
        shape, generator = (len(x), self.num_experts), context.generator(x.device)
        picks = torch.rand(shape, generator=generator, device=x.device).topk(self.top_k).indices
        probs = x.new_full(shape, 1 / self.num_experts, dtype=torch.float32)
        return forced_choice(x, picks, probs, context)
