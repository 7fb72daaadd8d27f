"""Devices, links and model shapes that simulations know by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from routerlab.core.config import ConfigError, nearest

_Named = TypeVar("_Named")


@dataclass(frozen=True)
class Machine:
    """Nodes of equal devices. Peaks are those of the makers' data sheets, bandwidths go one way.

    What a kernel or a collective reaches of them is an assumption, as are the overheads: change
    them with `dataclasses.replace` where you have measured better ones.
    """

    flops: int | float  # bfloat16 matrix products, without sparsity, FLOP/s
    memory_bandwidth: int | float  # byte/s
    memory: int | float  # bytes of a device
    link: int | float  # byte/s of a device to others of its node
    network: int | float  # byte/s of a device to other nodes
    devices_per_node: int = 8
    flops_reached: int | float = 0.65
    bandwidth_reached: int | float = 0.8
    expert_overhead: int | float = 20e-6  # s for each expert with tokens on a device, forward
    exchange_latency: int | float = 20e-6  # s for each all-to-all or collective
    layer_overhead: int | float = 100e-6  # s: counts are exchanged and read by the host
    planning: int | float = 300e-6  # s for the least-loaded plan, on the host

    @property
    def flops_rate(self) -> int | float:
        """FLOP/s that matrix products reach."""
        return self.flops * self.flops_reached

    @property
    def memory_rate(self) -> int | float:
        """Bytes a second that kernels bound by memory reach."""
        return self.memory_bandwidth * self.bandwidth_reached

    @property
    def link_rate(self) -> int | float:
        """Bytes a second, one way, inside a node."""
        return self.link * self.bandwidth_reached

    @property
    def network_rate(self) -> int | float:
        """Bytes a second, one way, between nodes."""
        return self.network * self.bandwidth_reached


MACHINES = {
    "a100": Machine(312e12, 2.04e12, 80e9, 300e9, 25e9),
    "h100": Machine(989e12, 3.35e12, 80e9, 450e9, 50e9),
    "h200": Machine(989e12, 4.8e12, 141e9, 450e9, 50e9),
}


@dataclass(frozen=True)
class LayerShape:
    """A layer of SwiGLU experts: N experts of width F on hidden states of width D, K a token."""

    num_experts: int
    d_model: int
    d_ff: int
    top_k: int

    @property
    def weight_elements(self) -> int:
        """Parameters of one expert."""
        return 3 * self.d_model * self.d_ff

    @property
    def token_elements(self) -> int:
        """Numbers kept for one assignment: input, gate and up, hidden, output."""
        return 2 * self.d_model + 3 * self.d_ff


@dataclass(frozen=True)
class ModelShape:
    """A decoder, its fields named as those of `Decoder`, all of whose layers have experts."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    num_experts: int
    top_k: int
    tie_embeddings: bool = False

    @property
    def layer(self) -> LayerShape:
        """Of its experts."""
        return LayerShape(self.num_experts, self.d_model, self.d_ff, self.top_k)

    @property
    def expert_parameters(self) -> int:
        """Of the routed experts of all layers."""
        return self.num_layers * self.num_experts * self.layer.weight_elements

    @property
    def matrix_parameters(self) -> int:
        """Outside the experts, of the products that every token meets: attention, router, head."""
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.d_model * (2 * width + 2 * kv_width)
        router = self.d_model * self.num_experts
        return self.num_layers * (attention + router) + self.vocab_size * self.d_model

    @property
    def other_parameters(self) -> int:
        """All that are not in experts; norms of heads and biases are not counted."""
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.d_model
        return self.matrix_parameters + embedding + (2 * self.num_layers + 1) * self.d_model

    @property
    def active_matrix_parameters(self) -> int:
        """Of the products that one token meets."""
        experts = self.num_layers * self.top_k * self.layer.weight_elements
        return self.matrix_parameters + experts


MODELS = {
    "quickstart": ModelShape(256, 128, 4, 4, 2, 32, 128, 8, 2),
    "olmoe-1b-7b": ModelShape(50304, 2048, 16, 16, 16, 128, 1024, 64, 8),
    "mixtral-8x7b": ModelShape(32000, 4096, 32, 32, 8, 128, 14336, 8, 2),
    "qwen3-30b-a3b": ModelShape(151936, 2048, 48, 32, 4, 128, 768, 128, 8),
    "gpt-oss-20b": ModelShape(201088, 2880, 24, 64, 8, 64, 2880, 32, 4),
    "gpt-oss-120b": ModelShape(201088, 2880, 36, 64, 8, 64, 2880, 128, 4),
}
LAYERS = {name: model.layer for name, model in MODELS.items()} | {
    "deepseek-v3": LayerShape(256, 7168, 2048, 8),
    "kimi-k2": LayerShape(384, 7168, 2048, 8),
}


def named(what: str, name: str, known: Mapping[str, _Named]) -> _Named:
    """The entry of that name; ``what`` is the field for the error message."""
    if name not in known:
        raise ConfigError(f"{what}={name}: no such {what}; {nearest(name, known)}")
    return known[name]
