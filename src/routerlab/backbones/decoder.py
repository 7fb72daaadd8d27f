"""A decoder language model whose feed-forward layers are mixtures of experts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from routerlab.backbones.attention import Attention, padding_mask, rotary_tables
from routerlab.backbones.trunk_cache import TrunkCache
from routerlab.core.checks import within
from routerlab.core.protocols import Dispatch, Experts, Router
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.experts.swiglu import SwiGLU
from routerlab.moe.layer import DenseSwiGLU, MoE


@dataclass(frozen=True, slots=True, eq=False)
class BackboneOutput:
    """Logits, and for each routed layer, by name and in the order of depth, its record."""

    logits: Float[Tensor, "B S V"]
    router_outputs: dict[str, RouterOutput]


torch.export.register_dataclass(BackboneOutput)  # FSDP2 looks for its tensors


class Decoder(nn.Module):
    """Pre-norm decoder: RMSNorm, rotary positions (half-split), grouped-query attention, and a MoE
    or a dense feed-forward network in each layer. Module names and weight layouts are those of
    transformers' MoE classes (``mlp`` is called ``moe`` where it is one), so that import and export
    are renaming. Attention is causal; real tokens do not attend to padding (``context.valid``).

    Args:
        router: a callable ``(d_model=, num_experts=) -> Router``, called once a layer.
        experts: a callable ``(d_model=, d_ff=, num_experts=) -> Experts``.
        vocab_size: V.
        d_model: D, a multiple of ``num_heads``; D / H must be even for rotary positions.
        num_layers: L.
        num_heads, num_kv_heads: query heads, and key-value heads, which must divide them.
        d_ff: F, hidden width of one expert.
        num_experts: E, routed experts: of every layer, or a list with one number a layer, 0 where
            the layer is dense.
        num_shared_experts: always-on experts of a MoE layer.
        max_positions: longest sequence.
        dense_d_ff: hidden width of dense layers; null: ``d_ff``.
        head_dim: width of a head; null: D / H.
        qk_norm: RMSNorm on each head's queries and keys.
        tie_embeddings: the output head is the embedding.
        rope_theta, rms_norm_eps: as in transformers.
        dispatch: see `MoE`.
        activation_checkpointing: recompute each block in backward (non-reentrant).
    """

    cos: Tensor
    sin: Tensor
    tokenizer: Any = None  # of a model that came with one

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
        dense_d_ff: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        tie_embeddings: bool = False,
        rope_theta: float = 10_000.0,
        rms_norm_eps: float = 1e-6,
        dispatch: str | Dispatch = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        within("vocab_size", vocab_size, 1)
        within("d_model", d_model, 1)
        within("num_layers", num_layers, 1)
        within("max_positions", max_positions, 1)
        within("rms_norm_eps", rms_norm_eps, 0, above=True)
        within("rope_theta", rope_theta, 0, above=True)
        head_dim = _head_width(d_model, num_heads, num_kv_heads, head_dim)
        dense_d_ff = d_ff if dense_d_ff is None else dense_d_ff
        within("dense_d_ff", dense_d_ff, 1)
        experts_of = _experts_by_layer(num_experts, num_layers)
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.rope_theta = rope_theta
        self.activation_checkpointing = activation_checkpointing
        self.embed_tokens = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            Block(
                Attention(d_model, num_heads, num_kv_heads, head_dim, qk_norm, rms_norm_eps),
                MoE(d_model, d_ff, count, router, experts, num_shared_experts, dispatch)
                if count
                else DenseSwiGLU(d_model, dense_d_ff),
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
        names = [f"layers.{i:0{digits}d}.moe" for i in range(num_layers)]
        self._names = [
            name if count else None for name, count in zip(names, experts_of, strict=True)
        ]
        self.layer_names = [name for name in self._names if name is not None]
        self._trunk: TrunkCache | None = None

    def forward(
        self,
        input_ids: Int[Tensor, "B S"],
        context: RoutingContext | None = None,
        logits_to_keep: int = 0,
    ) -> BackboneOutput:
        """Next-token logits of the last ``logits_to_keep`` positions (0: of all), and the record of
        every MoE layer.
        """
        batch_size, length = input_ids.shape
        if length > self.max_positions:
            raise ValueError(
                f"sequence of {length} tokens: longer than max_positions={self.max_positions}"
            )
        within("logits_to_keep", logits_to_keep, 0, length)
        if context is None:
            context = RoutingContext(batch_size, length)
        context = replace(context, token_ids=input_ids.reshape(-1))
        mask, rotary = padding_mask(context), (self.cos[:length], self.sin[:length])
        router_outputs: dict[str, RouterOutput] = {}
        blocks = list(enumerate(zip(self._names, self.layers, strict=True)))
        if self._trunk is None:
            x = self.embed_tokens(input_ids)
        else:
            blocks = blocks[self._trunk.depth :]
            x = self._trunk(input_ids, _real(input_ids, context.valid), self._below)
        for index, (name, block) in blocks:
            args = (x, rotary, context.at_layer(index), mask)
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Sampling routers draw from context.seed, so no generator state is to be kept.
                x, output = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x, output = block(*args)
            if name is not None:
                router_outputs[name] = output
        return BackboneOutput(self.lm_head(self.norm(x[:, -logits_to_keep:])), router_outputs)

    def keep_trunk(self) -> None:
        """From now on what the frozen dense layers below the first other one make of a sequence is
        kept in memory (`TrunkCache`): worth it where the same sequences come again and again.

        Raises ValueError where there is no such layer.
        """
        learns = [any(p.requires_grad for p in block.parameters()) for block in self.layers]
        others = [
            name is not None or found for name, found in zip(self._names, learns, strict=True)
        ]
        depth = 0 if self.embed_tokens.weight.requires_grad else others.index(True)
        if not depth:
            raise ValueError(
                "keep_trunk=true: no frozen dense layer is below the first one that learns or "
                "routes; use keep_trunk=false"
            )
        self._trunk = TrunkCache(depth)

    @property
    def keeps_trunk(self) -> bool:
        """Whether `keep_trunk` was called."""
        return self._trunk is not None

    def _below(
        self, input_ids: Int[Tensor, "B S"], valid: Bool[Tensor, "B S"]
    ) -> Float[Tensor, "B S D"]:
        """The hidden states above the layers whose work is kept."""
        batch_size, length = input_ids.shape
        context = RoutingContext(batch_size, length, valid=valid.reshape(-1))
        mask, rotary = padding_mask(context), (self.cos[:length], self.sin[:length])
        x = self.embed_tokens(input_ids)
        for block in self.layers[: cast(TrunkCache, self._trunk).depth]:
            x, _ = block(x, rotary, context, mask)
        return x

    @property
    def moe_layers(self) -> dict[str, Any]:
        """The MoE of each layer that has one, by the name of its record."""
        blocks: Any = zip(self._names, self.layers, strict=True)
        return {name: block.moe for name, block in blocks if name is not None}

    def count_parameters(self) -> dict[str, int]:
        """``total`` parameters, and those ``active`` for one token: K of E experts a layer, or all
        of them where the router has no fixed ``top_k``. A tied head counts once. ``trainable`` are
        those that learn, and ``experts`` is the number of routed experts in all layers.
        """
        total = sum(p.numel() for p in self.parameters())
        idle = 0.0
        for moe in self.moe_layers.values():
            num_experts = moe.experts.num_experts
            picked = getattr(moe.router, "top_k", num_experts)
            idle += sum(p.numel() for p in moe.experts.parameters()) * (1 - picked / num_experts)
        experts = sum(moe.experts.num_experts for moe in self.moe_layers.values())
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        counts = {"total": total, "active": round(total - idle), "trainable": trainable}
        return counts | {"experts": experts}


class Block(nn.Module):
    """Attention and MoE, or a dense network, each on normalised input and added to the residual
    stream.
    """

    def __init__(
        self, attention: Attention, network: MoE | DenseSwiGLU, d_model: int, eps: float
    ) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(d_model, eps=eps)
        self.self_attn = attention
        self.post_attention_layernorm = nn.RMSNorm(d_model, eps=eps)
        self.moe = network if isinstance(network, MoE) else None
        self.mlp = network if isinstance(network, DenseSwiGLU) else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        context: RoutingContext,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, RouterOutput | None]:
        """The residual stream after this block, and the record of its router if it has one."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask)
        normalized, output = self.post_attention_layernorm(x), None
        if self.moe is not None:
            y, output = self.moe(normalized, context)
        else:
            y = cast(DenseSwiGLU, self.mlp)(normalized)
        return x + y, output


def _experts_by_layer(num_experts: int | list[int], num_layers: int) -> list[int]:
    counts = [num_experts] * num_layers if isinstance(num_experts, int) else num_experts
    if len(counts) != num_layers or not any(counts):
        raise ValueError(
            f"num_experts={num_experts}: one number for each of {num_layers=}, not all 0"
        )
    return counts


def _real(input_ids: Int[Tensor, "B S"], valid: Bool[Tensor, "T"] | None) -> Bool[Tensor, "B S"]:
    if valid is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return valid.view_as(input_ids)


def _head_width(d_model: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> int:
    if num_heads < 1 or (head_dim is None and d_model % num_heads):
        raise ValueError(f"d_model={d_model}: must be a multiple of num_heads={num_heads}")
    width = d_model // num_heads if head_dim is None else head_dim
    if width % 2 or width < 2:
        what = f"d_model={d_model} / num_heads={num_heads}" if head_dim is None else f"{head_dim=}"
        raise ValueError(f"{what}: heads must have an even width for rotary positions")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads}: must divide num_heads={num_heads}")
    return width


@torch.no_grad()
def _scale_residual_branches(block: nn.Module, scale: float) -> None:
    """Shrink what each branch adds, so that the residual stream keeps its size over depth."""
    names = ("o_proj.weight", "down_proj", "down_proj.weight")
    for name, parameter in block.named_parameters():
        if name.endswith(names):
            parameter.mul_(scale)
