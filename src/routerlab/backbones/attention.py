"""Causal attention with rotary positions, and the mask that padding asks for."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.core.routing import RoutingContext


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al., arXiv 2305.13245) with rotary positions."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.gqa = num_kv_heads < num_heads
        width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = nn.Linear(d_model, width, bias=False)
        self.k_proj = nn.Linear(d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(width, d_model, bias=False)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rotary: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "B 1 S S"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Each token's mixture of itself and the tokens before it, or of those that its row of
        ``mask`` allows.
        """
        shape = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), *rotary)
        k = rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), *rotary)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.gqa
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


def padding_mask(context: RoutingContext) -> Bool[Tensor, "B 1 S S"] | None:
    """What each token may attend to where padding comes before real tokens; None where being causal
    is enough. Padding attends to itself, so that no row is empty.
    """
    if context.valid is None:
        return None
    valid = context.valid.view(context.batch_size, -1)
    if not bool((valid[:, 1:] & ~valid[:, :-1]).any()):
        return None
    length = valid.shape[1]
    square = torch.ones(length, length, dtype=torch.bool, device=valid.device)
    return ((square.tril() & valid[:, None]) | torch.diag(square[0]))[:, None]


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim] of rotary positions (Su et al., arXiv 2104.09864)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(
    x: Float[Tensor, "B H S d"], cos: Float[Tensor, "S d"], sin: Float[Tensor, "S d"]
) -> Float[Tensor, "B H S d"]:
    """``x`` turned by its position; the halves of a head are the two coordinates."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)
