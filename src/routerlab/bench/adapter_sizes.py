"""The sizes of a base model, its batches and its adapters. Imports no torch: the command line reads
them first.
"""

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class AdapterSizes:
    """A llama of random weights, a batch, and what every method gets where it has such a knob."""

    num_layers: int = 4
    d_model: int = 256
    d_ff: int = 704
    num_heads: int = 4
    num_kv_heads: int = 4
    vocab_size: int = 512
    batch_size: int = 4
    sequence_length: int = 128
    num_experts: int = 8
    top_k: int = 2
    r: int = 8

    def __post_init__(self) -> None:
        for name in names():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 2 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k={self.top_k}: must be from 2 (one weight that sums to 1 has no gradient) "
                f"to num_experts={self.num_experts}"
            )
        if self.d_model % self.num_heads or self.d_model // self.num_heads % 2:
            raise ValueError(
                f"num_heads={self.num_heads}: must cut d_model={self.d_model} into even widths"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}"
            )
        if self.sequence_length < 4:
            raise ValueError(f"sequence_length={self.sequence_length}: must be at least 4")

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers, D={self.d_model}, F={self.d_ff}, V={self.vocab_size}, "
            f"{self.batch_size} x {self.sequence_length} tokens, E={self.num_experts}, "
            f"K={self.top_k}, r={self.r}"
        )


def names() -> list[str]:
    """The names of all sizes."""
    return [field.name for field in fields(AdapterSizes)]


BASES = {
    "small": AdapterSizes(),
    # SmolLM2-135M has 30 such layers: with fewer, the head's share of the time is larger.
    "smollm2": AdapterSizes(d_model=576, d_ff=1536, num_heads=9, num_kv_heads=3, vocab_size=49152),
}


def sizes_of(base: str, changes: dict[str, int]) -> AdapterSizes:
    """The sizes of one of `BASES` with some changed."""
    if base not in BASES:
        raise ValueError(f"base={base!r}: must be among {', '.join(BASES)}")
    return replace(BASES[base], **changes)
