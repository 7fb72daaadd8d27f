"""Which tensor of ours is which tensors of a checkpoint of transformers, in both directions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Link:
    """One tensor of ours and the tensors of theirs that hold the same numbers.

    ``ours`` is None for a tensor that their class wants and ours has not: zeros.
    """

    ours: str | None
    theirs: tuple[str, ...]
    how: str
    to_ours: Callable[[list[Tensor]], Tensor]
    to_theirs: Callable[[Tensor], Iterable[Tensor]]


def renamed(ours: str, *theirs: str) -> Link:
    """The same tensor, which they may hold under several names."""

    def to_ours(found: list[Tensor]) -> Tensor:
        if not all(torch.equal(found[0], other) for other in found[1:]):
            raise ValueError(f"{' and '.join(theirs)}: must be equal, since they are tied")
        return found[0]

    return Link(ours, theirs, "renamed", to_ours, lambda own: [own for _ in theirs])


def gate_and_up(ours: str, gate: str, up: str) -> Link:
    """Ours [2F, D]: their gate rows, then their up rows."""
    return Link(ours, (gate, up), "gate and up stacked", torch.cat, lambda own: own.chunk(2))


def stacked(ours: str, theirs: Sequence[str]) -> Link:
    """Ours [E, ...]: their tensors of E experts."""
    return Link(ours, tuple(theirs), "experts stacked", torch.stack, lambda own: own.unbind(0))


def stacked_gate_and_up(ours: str, gates: Sequence[str], ups: Sequence[str]) -> Link:
    """Ours [E, 2F, D]: their gate and up rows of E experts."""

    def to_ours(theirs: list[Tensor]) -> Tensor:
        count = len(theirs) // 2
        return torch.cat([torch.stack(theirs[:count]), torch.stack(theirs[count:])], dim=1)

    def to_theirs(own: Tensor) -> Iterable[Tensor]:
        gate, up = own.chunk(2, dim=1)
        return [*gate.unbind(0), *up.unbind(0)]

    return Link(ours, (*gates, *ups), "experts, gate and up stacked", to_ours, to_theirs)


def doubled(ours: str, theirs: str) -> Link:
    """Theirs is twice ours (exactly: a power of two)."""
    return Link(ours, (theirs,), "times 2", lambda found: found[0] / 2, lambda own: [own * 2])


def interleaved(ours: str, theirs: str, head_dim: int) -> Link:
    """Rows of queries or keys: a head's coordinates that turn together are d/2 apart in ours, and
    neighbours in theirs.
    """

    def to_ours(found: list[Tensor]) -> Tensor:
        heads = found[0].unflatten(0, (-1, head_dim // 2, 2))
        return heads.transpose(1, 2).reshape(found[0].shape)

    def to_theirs(own: Tensor) -> Iterable[Tensor]:
        heads = own.unflatten(0, (-1, 2, head_dim // 2))
        return [heads.transpose(1, 2).reshape(own.shape)]

    return Link(ours, (theirs,), "rows interleaved", to_ours, to_theirs)


def one_row(ours: str, theirs: str) -> Link:
    """Ours [E]: the only row of theirs [1, E]."""
    return Link(ours, (theirs,), "one row", lambda found: found[0][0], lambda own: [own[None]])


def zeros(theirs: str, *shape: int) -> Link:
    """Zeros in theirs, nothing in ours."""

    def to_ours(found: list[Tensor]) -> Tensor:
        if found[0].any():
            raise ValueError(f"{theirs}: must be zeros, since our decoder has no place for it")
        return found[0]

    return Link(None, (theirs,), "zeros", to_ours, lambda own: [torch.zeros(shape)])
