"""The linear map from tokens to router logits that most routers begin with."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.core.checks import within


class Gate(nn.Linear):
    """Router logits :math:`x W^T`, in float32 also under autocast (a cast alone would not help).

    Args:
        d_model: D.
        num_experts: E.
        init_std: standard deviation of the initial weights.
    """

    def __init__(self, d_model: int, num_experts: int, init_std: float = 0.02) -> None:
        within("num_experts", num_experts, 1)
        within("init_std", init_std, 0)
        super().__init__(d_model, num_experts, bias=False)
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, input: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Logits in float32 (float64 for float64 tokens)."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        with full_precision(input):
            return F.linear(input.to(dtype), self.weight.to(dtype))


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of ``x``: for all that follows the logits."""
    return torch.autocast(x.device.type, enabled=False)
