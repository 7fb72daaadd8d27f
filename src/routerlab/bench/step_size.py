"""The model and the batch of whole training steps: light, because arguments are read with it."""

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, slots=True)
class StepSize:
    """A small language model and its batch; the defaults are those of ``experiment=quickstart``."""

    vocab_size: int = 256
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    d_ff: int = 128
    batch_size: int = 16
    sequence_length: int = 128
    num_kv_heads: int = 2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
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

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers, D={self.d_model}, F={self.d_ff}, E={self.num_experts}, "
            f"K={self.top_k}, {self.batch_size} x {self.sequence_length} tokens"
        )

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch_size * self.sequence_length

    def words(self) -> list[str]:
        """What ``routerlab train`` is told to train at this size."""
        backbone = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("top_k", "batch_size", "sequence_length")
        }
        return [
            *(f"backbone.{name}={value}" for name, value in backbone.items()),
            f"router.top_k={self.top_k}",
            f"data.batch_size={self.batch_size}",
            f"data.seq_len={self.sequence_length}",
        ]


def names() -> list[str]:
    """The sizes that can be asked for."""
    return [field.name for field in fields(StepSize) if field.name != "vocab_size"]
