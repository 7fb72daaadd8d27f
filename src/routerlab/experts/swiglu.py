"""SwiGLU experts with stacked weights."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.ops.grouped_mm import grouped_mm
from routerlab.ops.swiglu import weighted_swiglu


class SwiGLU(nn.Module):
    r""":math:`W_{down}(\mathrm{silu}(W_{gate} x) \odot W_{up} x)` for each of E experts
    (Shazeer, arXiv 2002.05202).

    Weights are stored as Hugging Face stores them: ``gate_up_proj`` [E, 2F, D], gate rows first,
    and ``down_proj`` [E, D, F]. The combine weight multiplies the hidden row, which gives the same
    output and a cheaper gradient than weighting the output row.
    """

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__()
        if d_ff < 1:
            raise ValueError(f"d_ff={d_ff}: must be at least 1")
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * d_ff, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        nn.init.normal_(self.gate_up_proj, std=d_model**-0.5)
        nn.init.normal_(self.down_proj, std=d_ff**-0.5)

    @property
    def swiglu_weights(self) -> tuple[Tensor, Tensor] | None:
        """Both stacks of weights, for code that computes the experts itself; None where it may not:
        a subclass computes something else, or a hook wants to see the call.
        """
        ours = type(self).forward is SwiGLU.forward
        watched = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks
        return (self.gate_up_proj, self.down_proj) if ours and not watched else None

    def forward(
        self,
        x: Float[Tensor, "N D"],
        tokens_per_expert: Int[Tensor, "E"],
        combine_weights: Float[Tensor, "N"],
    ) -> Float[Tensor, "N D"]:
        """Weighted outputs of rows sorted by expert, ``tokens_per_expert`` rows for each."""
        gate_up = grouped_mm(x, self.gate_up_proj, tokens_per_expert)
        hidden = weighted_swiglu(gate_up, combine_weights.to(gate_up.dtype))
        return grouped_mm(hidden, self.down_proj, tokens_per_expert)

    def expert(
        self, index: int, x: Float[Tensor, "n D"], combine_weights: Float[Tensor, "n"]
    ) -> Float[Tensor, "n D"]:
        """Weighted outputs of one expert."""
        gate, up = F.linear(x, self.gate_up_proj[index]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[index]) * combine_weights[:, None]
