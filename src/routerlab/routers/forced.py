"""The record of a choice that nothing learns: what the control routers return."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext


def forced_choice(
    x: Float[Tensor, "T D"],
    expert_indices: Int[Tensor, "T K"],
    router_probs: Float[Tensor, "T E"],
    context: RoutingContext | None,
) -> RouterOutput:
    """K given experts a token with weights 1/K. There are no scores: all logits are 0, also where
    ``router_probs`` are not uniform (the log of a probability of 0 is not finite).
    """
    probs = router_probs.to(torch.promote_types(x.dtype, torch.float32))
    weights = torch.full_like(expert_indices, 1 / expert_indices.shape[1], dtype=probs.dtype)
    valid = None if context is None else context.valid
    return RouterOutput.from_top_k(
        torch.zeros_like(probs), probs, expert_indices, weights, valid=valid
    )
