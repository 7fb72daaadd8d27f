"""The readable definition of dispatch: one expert after the other."""

import torch
from jaxtyping import Float
from torch import Tensor

from routerlab.core.protocols import Experts
from routerlab.core.routing import RouterOutput


class Loop:
    """For each token the weighted sum of its experts' outputs, in any dtype.

    Slow for many experts, and right: every fast path is tested against this one.
    """

    def __call__(
        self, x: Float[Tensor, "T D"], output: RouterOutput, experts: Experts
    ) -> Float[Tensor, "T D"]:
        y = torch.zeros_like(x)
        for index in range(experts.num_experts):
            chosen = output.expert_indices == index
            tokens = output.token_indices[chosen]
            weights = output.combine_weights[chosen].to(x.dtype)
            y = y.index_add(0, tokens, experts.expert(index, x[tokens], weights).to(x.dtype))
        return y
