"""Tokens to show a router: of many sizes, with padding, permuted, and hard on arithmetic."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from routerlab.core.routing import RoutingContext

D_MODEL = 16
SIZES = ((1, 1), (1, 5), (2, 4), (1, 13), (3, 8))  # (B, S): T = 1, T < E, T = E, T % E > 0, T > E
RAGGED = (8, 5, 1)  # lengths of the three sequences where there is padding


@dataclass(frozen=True)
class Probe:
    """Tokens and their context. All of the context is filled, so no router lacks what it reads."""

    x: Float[Tensor, "T D"]
    context: RoutingContext

    def reseeded(self, seed: int) -> "Probe":
        """The same tokens with other random draws."""
        return Probe(self.x, replace(self.context, seed=seed, step_seed=seed + 1))

    def with_rows(self, rows: Tensor, other: "Probe", scale: float = 1.0) -> "Probe":
        """The tokens at ``rows`` (a mask [T]) replaced by those of ``other``."""
        x = torch.where(rows[:, None], scale * other.x, self.x)
        ids = torch.where(rows, other.token_ids, self.token_ids)
        return Probe(x, replace(self.context, token_ids=ids))

    @property
    def token_ids(self) -> Int[Tensor, "T"]:
        """Vocabulary ids."""
        assert self.context.token_ids is not None
        return self.context.token_ids

    @property
    def valid(self) -> Bool[Tensor, "T"]:
        """False on padding."""
        valid = self.context.valid
        return torch.ones(len(self.x), dtype=torch.bool) if valid is None else valid


def probe(
    batch_size: int,
    length: int,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> Probe:
    """Random tokens of ``batch_size`` sequences; with ``lengths`` the rest of each is padding."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * batch_size + length)
    num_tokens = batch_size * length
    valid = None
    if lengths is not None:
        valid = (torch.arange(length) < torch.tensor(lengths)[:, None]).flatten()
    context = RoutingContext(
        batch_size=batch_size,
        sequence_length=length,
        valid=valid,
        task_ids=torch.arange(batch_size),
        noise_level=torch.rand(batch_size, generator=generator),
        sequence_embedding=torch.randn(batch_size, D_MODEL, generator=generator),
        progress=0.5,
        token_ids=torch.randint(64, (num_tokens,), generator=generator),
        seed=7,
        step_seed=11,
        layer=1,
    )
    return Probe(torch.randn(num_tokens, D_MODEL, generator=generator), context)


def probes() -> list[Probe]:
    """One of each size, one with padding, and one that is nothing but padding."""
    return [probe(*s) for s in SIZES] + [probe(3, 8, RAGGED), probe(2, 3, (0, 0))]


def hard_probes(logit: float) -> Iterator[tuple[str, Probe]]:
    """Inputs on which arithmetic tends to break; ``logit`` is the largest for random tokens."""
    logit = min(max(logit, 1e-3), 1e4)
    scales = {"zeros": 0.0, "tiny tokens": 1e-30}
    scales |= {"logits of 100": 100 / logit, "logits of 1e4": 1e4 / logit}
    for batch_size, length in ((1, 1), (1, 5), (1, 13), (3, 8)):
        base = probe(batch_size, length)
        equal = base.x[:1].repeat(len(base.x), 1)
        shown = {name: scale * base.x for name, scale in scales.items()}
        shown |= {
            "equal tokens": equal,
            "equal tokens, logits of 1e4": scales["logits of 1e4"] * equal,
        }
        for name, x in shown.items():
            yield f"{name} (T={len(x)})", Probe(x, base.context)


def permuted(shown: Probe) -> tuple[Tensor, Probe]:
    """A permutation of tokens that keeps sequences together, and the permuted probe."""
    context = shown.context
    generator = torch.Generator().manual_seed(3)
    length = context.sequence_length
    sequences = torch.randperm(context.batch_size, generator=generator)
    inside = [torch.randperm(length, generator=generator) for _ in sequences]
    order = torch.cat([s * length + p for s, p in zip(sequences, inside, strict=True)])
    by_token = {name: getattr(context, name) for name in ("valid", "token_ids")}
    by_sequence = {n: getattr(context, n) for n in ("task_ids", "noise_level")}
    by_sequence["sequence_embedding"] = context.sequence_embedding
    moved: dict[str, Any] = {n: v[order] for n, v in by_token.items() if v is not None}
    moved |= {n: v[sequences] for n, v in by_sequence.items() if v is not None}
    return order, Probe(shown.x[order], replace(context, **moved))


def repadded(shown: Probe, batch_size: int, length: int) -> Probe:
    """The same sequences in a larger batch: longer padding, more sequences that are all padding."""
    old, new = shown.context, probe(batch_size, length, [0] * batch_size, seed=5)
    place = torch.zeros(batch_size, length, dtype=torch.bool)
    place[: old.batch_size, : old.sequence_length] = True
    rows, x = place.flatten(), new.x.clone()
    token_ids, valid = new.token_ids.clone(), torch.zeros_like(rows)
    x[rows], token_ids[rows], valid[rows] = shown.x, shown.token_ids, shown.valid
    per_sequence = {}
    for name in ("task_ids", "noise_level", "sequence_embedding"):
        per_sequence[name] = torch.cat([getattr(old, name), getattr(new.context, name)])
        per_sequence[name] = per_sequence[name][:batch_size]
    return Probe(x, replace(new.context, token_ids=token_ids, valid=valid, **per_sequence))
