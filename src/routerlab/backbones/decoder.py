"""A decoder language model whose feed-forward layers are mixtures of experts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from routerlab.core.protocols import Experts, Router
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.experts.swiglu import SwiGLU
from routerlab.moe.layer import MoE


@dataclass(frozen=True, slots=True, eq=False)
class BackboneOutput:
    """Logits, and for each routed layer, by name and in the order of depth, its record."""

    logits: Float[Tensor, "B S V"]
    router_outputs: dict[str, RouterOutput]


class Decoder(nn.Module):
    """Pre-norm decoder: RMSNorm, rotary positions (half-split), grouped-query attention and one
    MoE a layer. Module names and weight layouts are those of transformers' MoE classes (``mlp`` is
    called ``moe``), so that import and export are renaming. Attention is causal and knows of no
    padding: where there is any (``context.valid``), it must be on the right.

    Args:
        router: a callable ``(d_model=, num_experts=) -> Router``, called once a layer.
        experts: a callable ``(d_model=, d_ff=, num_experts=) -> Experts``.
        vocab_size: V.
        d_model: D, a multiple of ``num_heads``; D / H must be even for rotary positions.
        num_layers: L.
        num_heads, num_kv_heads: query heads, and key-value heads, which must divide them.
        d_ff: F, hidden width of one expert.
        num_experts: E, routed experts: of every layer, or a list with one number a layer.
        num_shared_experts: always-on experts of a layer.
        max_positions: longest sequence.
        qk_norm: RMSNorm on each head's queries and keys.
        tie_embeddings: the output head is the embedding.
        rope_theta, rms_norm_eps: as in transformers.
        dispatch: ``autograd`` or ``loop``, see `MoE`.
        activation_checkpointing: recompute each block in backward (non-reentrant).
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        router: Callable[..., Router],
        experts: Callable[..., Experts] = SwiGLU,
        *,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        d_ff: int,
        num_experts: int | list[int],
        max_positions: int,
        num_shared_experts: int = 0,
        qk_norm: bool = False,
        tie_embeddings: bool = False,
        rope_theta: float = 10_000.0,
        rms_norm_eps: float = 1e-6,
        dispatch: str = "autograd",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        counts = {"vocab_size": vocab_size, "d_model": d_model, "num_layers": num_layers}
        for name, value in (counts | {"max_positions": max_positions}).items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if rms_norm_eps <= 0 or rope_theta <= 0:
            raise ValueError(f"{rms_norm_eps=}, {rope_theta=}: must be above 0")
        _check_widths(d_model, num_heads, num_kv_heads)
        experts_of = [num_experts] * num_layers if isinstance(num_experts, int) else num_experts
        if len(experts_of) != num_layers:
            raise ValueError(f"num_experts={num_experts}: one number for each of {num_layers=}")
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.activation_checkpointing = activation_checkpointing
        head_dim = d_model // num_heads
        self.embed_tokens = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            Block(
                Attention(d_model, num_heads, num_kv_heads, qk_norm, rms_norm_eps),
                MoE(d_model, d_ff, count, router, experts, num_shared_experts, dispatch),
                d_model,
                rms_norm_eps,
            )
            for count in experts_of
        )
        self.norm = nn.RMSNorm(d_model, eps=rms_norm_eps)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.embed_tokens.weight)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        for block in self.layers:
            _scale_residual_branches(block, 1 / math.sqrt(2 * num_layers))
        if tie_embeddings:
            self.embed_tokens.weight = self.lm_head.weight
        cos, sin = rotary_tables(max_positions, head_dim, rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        digits = max(2, len(str(num_layers - 1)))  # zero-padded: sorting by name is by depth
        self.layer_names = [f"layers.{i:0{digits}d}.moe" for i in range(num_layers)]

    def forward(
        self, input_ids: Int[Tensor, "B S"], context: RoutingContext | None = None
    ) -> BackboneOutput:
        """Next-token logits, and the record of every layer."""
        batch_size, length = input_ids.shape
        if length > self.max_positions:
            raise ValueError(
                f"sequence of {length} tokens: longer than max_positions={self.max_positions}"
            )
        if context is None:
            context = RoutingContext(batch_size, length)
        context = replace(context, token_ids=input_ids.reshape(-1))
        x = self.embed_tokens(input_ids)
        rotary = (self.cos[:length], self.sin[:length])
        router_outputs: dict[str, RouterOutput] = {}
        for index, (name, block) in enumerate(zip(self.layer_names, self.layers, strict=True)):
            args = (x, rotary, context.at_layer(index))
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Sampling routers draw from context.seed, so no generator state is to be kept.
                x, router_outputs[name] = checkpoint(
                    block, *args, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, router_outputs[name] = block(*args)
        return BackboneOutput(self.lm_head(self.norm(x)), router_outputs)

    @property
    def moe_layers(self) -> dict[str, Any]:
        """The MoE of each layer, by the name that its record has."""
        blocks = zip(self.layer_names, self.layers, strict=True)
        return {name: block.moe for name, block in blocks}

    def count_parameters(self) -> dict[str, int]:
        """``total`` parameters, and those ``active`` for one token: K of E experts a layer, or all
        of them where the router has no fixed ``top_k``. A tied head counts once. ``experts`` is the
        number of routed experts in all layers.
        """
        total = sum(p.numel() for p in self.parameters())
        idle = 0.0
        for block in self.layers:
            moe: Any = block.moe
            num_experts = moe.experts.num_experts
            picked = getattr(moe.router, "top_k", num_experts)
            idle += sum(p.numel() for p in moe.experts.parameters()) * (1 - picked / num_experts)
        experts = sum(moe.experts.num_experts for moe in self.moe_layers.values())
        return {"total": total, "active": round(total - idle), "experts": experts}


class Block(nn.Module):
    """Attention and MoE, each on normalised input and added to the residual stream."""

    def __init__(self, attention: "Attention", moe: MoE, d_model: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(d_model, eps=eps)
        self.self_attn = attention
        self.post_attention_layernorm = nn.RMSNorm(d_model, eps=eps)
        self.moe = moe

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], context: RoutingContext
    ) -> tuple[Tensor, RouterOutput]:
        """The residual stream after this block, and the record of its router."""
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        y, output = self.moe(self.post_attention_layernorm(x), context)
        return x + y, output


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al., arXiv 2305.13245) with rotary positions."""

    def __init__(
        self, d_model: int, num_heads: int, num_kv_heads: int, qk_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.head_dim = d_model // num_heads
        self.gqa = num_kv_heads < num_heads
        kv_width = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=d_model**-0.5)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()

    def forward(
        self, x: Float[Tensor, "B S D"], rotary: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "B S D"]:
        """Each token's mixture of itself and the tokens before it."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), *rotary)
        k = rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), *rotary)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.gqa)
        return self.o_proj(y.transpose(1, 2).reshape(x.shape))


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


def _check_widths(d_model: int, num_heads: int, num_kv_heads: int) -> None:
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"d_model={d_model}: must be a multiple of num_heads={num_heads}")
    if (d_model // num_heads) % 2:
        raise ValueError(
            f"d_model={d_model} / num_heads={num_heads}: heads must have an even width for "
            "rotary positions"
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads}: must divide num_heads={num_heads}")


@torch.no_grad()
def _scale_residual_branches(block: nn.Module, scale: float) -> None:
    """Shrink what each branch adds, so that the residual stream keeps its size over depth."""
    names = ("o_proj.weight", "down_proj", "down_proj.weight")
    for name, parameter in block.named_parameters():
        if name.endswith(names):
            parameter.mul_(scale)
