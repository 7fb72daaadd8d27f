"""Loss-free balancing: a bias for each expert, moved against its load."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from routerlab.core.checks import choice, within
from routerlab.core.routing import RoutingContext


class ExpertBias(nn.Module):
    r"""A bias b on the choice, never on the weights (Wang et al., arXiv 2408.15664; used in
    DeepSeek-V3, 2412.19437).

    After each optimizer step, from its counts c over all micro-batches and ranks, with
    :math:`e_i = \bar c - c_i`:

    - ``rule="sign"``: :math:`b_i \leftarrow b_i + u\,\mathrm{sign}(e_i)`;
    - ``rule="proportional"``: :math:`b_i \leftarrow b_i + u\,e_i / \bar c`. The paper does not give
      the unit of e here; the relative error is our reading [reconstructed].

    ``b`` is a float32 buffer that starts at 0 and is used, not moved, in evaluation. Keep it in
    float32: in bf16 steps of 1e-3 would be lost.

    Args:
        num_experts: E.
        rate: u.
        rule: ``sign`` or ``proportional``.
        zero_mean: take the mean off each change, as torchtitan does; changes no choice.
    """

    causal = True
    causal_training = True
    bias: Tensor

    def __init__(
        self, num_experts: int, rate: float = 1e-3, rule: str = "sign", zero_mean: bool = False
    ) -> None:
        super().__init__()
        within("rate", rate, 0)
        choice("rule", rule, ("sign", "proportional"))
        self.rate, self.rule, self.zero_mean = rate, rule, zero_mean
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(
        self, scores: Float[Tensor, "T E"], top_k: int, context: RoutingContext | None = None
    ) -> tuple[Float[Tensor, "E"], Float[Tensor, "E"]]:
        """The bias, and the same again: single micro-batches propose no change."""
        return self.bias, self.bias

    @torch.no_grad()
    def update(self, requests_per_expert: Int[Tensor, "E"], proposal: Float[Tensor, "E"]) -> None:
        """Once an optimizer step, with its counts; without any count nothing changes."""
        counts = requests_per_expert.double()
        error = (counts.mean() - counts) / counts.mean().clamp(min=1e-12)
        change = error.sign() if self.rule == "sign" else error
        if self.zero_mean:
            change = change - change.mean()
        self.bias += (self.rate * change).to(self.bias.dtype)
