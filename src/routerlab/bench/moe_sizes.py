"""The sizes of a mixture of experts of transformers and of its batches. Imports no torch: the
command line reads them first.
"""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class MoeSizes:
    """An OLMoE of random weights, and a batch."""

    num_layers: int = 8
    d_model: int = 256
    d_ff: int = 128
    num_experts: int = 16
    top_k: int = 4
    num_heads: int = 4
    vocab_size: int = 512
    batch_size: int = 8
    sequence_length: int = 64

    def __post_init__(self) -> None:
        for field in fields(MoeSizes):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)}: must be at least 1")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k}: must be at most num_experts={self.num_experts}")
        if self.d_model % self.num_heads or self.d_model // self.num_heads % 2:
            raise ValueError(
                f"num_heads={self.num_heads}: must cut d_model={self.d_model} into even widths"
            )
        if self.sequence_length < 4:
            raise ValueError(f"sequence_length={self.sequence_length}: must be at least 4")

    def __str__(self) -> str:
        return (
            f"OLMoE, {self.num_layers} layers, D={self.d_model}, F={self.d_ff}, "
            f"E={self.num_experts}, K={self.top_k}, "
            f"{self.batch_size} x {self.sequence_length} tokens"
        )

    def config(self) -> dict[str, Any]:
        """The config of transformers."""
        return {
            "model_type": "olmoe",
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "eos_token_id": None,
        }


def names() -> list[str]:
    """The names of all sizes."""
    return [field.name for field in fields(MoeSizes)]
