"""Soft routing: every token uses all experts."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.gate import Gate, full_precision


class SoftRouter(nn.Module):
    r"""All E experts with weights :math:`\mathrm{softmax}(x W^T)`: a dense mixture
    (Eigen et al., arXiv 1312.4314). It costs E experts a token; nothing is chosen.

    Args:
        d_model: D, width of the tokens.
        num_experts: E.
        init_std: standard deviation of the gate's initial weights.
    """

    causal = True

    def __init__(self, d_model: int, num_experts: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.num_experts = self.top_k = num_experts
        self.gate = Gate(d_model, num_experts, init_std)

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of all experts for every real token, in their order."""
        valid = None if context is None else context.valid
        with full_precision(x):
            logits = self.gate(x)
            probs = logits.softmax(-1)
        experts = torch.arange(self.num_experts, device=x.device).expand(len(x), -1)
        return RouterOutput.from_top_k(logits, probs, experts, probs, valid=valid)
