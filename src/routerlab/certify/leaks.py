"""Who learns of whom: what moves when later tokens, other sequences or padding change.

Training draws are the same in both runs, since a context holds their seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from routerlab.backbones.decoder import BackboneOutput, Decoder
from routerlab.certify.contract import mode, require
from routerlab.certify.probes import D_MODEL, RAGGED, Probe, probe
from routerlab.certify.subject import (
    NUM_EXPERTS,
    TOLERANCE,
    Subject,
    declares,
    run,
    says,
    sharpen,
    update,
    view,
)

BATCH, LENGTH, VOCAB, LAYERS = 3, 8, 32, 3
LATER, OTHERS, PADDING = "later tokens", "another sequence", "padding"


def check_router_leak(subject: Subject, training: bool) -> str | None:
    """Of a router alone: the records of tokens that should know nothing of what was changed."""
    router = subject.router(training)
    moves = router_moves(router, draws=10 if subject.is_random(training) else 2)
    require(PADDING not in moves, f"padding moves real tokens {mode(training)}")
    return _judge(
        router, training, [f"changing {what} moves {count} tokens" for what, count in moves.items()]
    )


def check_model_leak(subject: Subject, training: bool) -> str | None:
    """Of a model of three layers: records and next-token logits at places that should not know.
    (Attention carries changes to later places, and never to earlier ones.)
    """
    moves = model_moves(subject, training)
    for move in moves:
        require(move.changed != PADDING, f"{move} {mode(training)}")
    return _judge(subject.router(training), training, [str(move) for move in moves])


def _judge(router: Any, training: bool, found: list[str]) -> str | None:
    """Compares what moved with what the router says of itself."""
    name = "causal_training" if training else "causal"
    if declares(router, training):
        require(not found, f"{'; '.join(found)} {mode(training)}, though {name} is True")
        return None
    return f"{name} is False: " + ("; ".join(found) or "nothing moved in these draws")


# -- a router alone -------------------------------------------------------------------------------


def router_moves(router: Any, draws: int) -> dict[str, int]:
    """What moves tokens that should not notice, and the most tokens it moved at once, of so many
    draws of the tokens and of the router's own.
    """
    moves: dict[str, int] = {}
    for changed, base, rows, watched in _router_cases(says(router, "order_dependent"), draws):
        plain = view(run(router, base))
        for other in _replacements(base, rows):
            moved = int((view(run(router, other)).moved(plain) & watched).sum())
            if moved:
                moves[changed] = max(moves.get(changed, 0), moved)
    return moves


def _router_cases(by_place: bool, draws: int) -> Iterator[tuple[str, Probe, Tensor, Tensor]]:
    """(what changes, tokens, the rows that change, the rows that should not move). Where the place
    in the batch matters, later sequences may depend on earlier ones: they wait in the same queue.
    """
    place = torch.arange(BATCH * LENGTH)
    sequence, position = place // LENGTH, place % LENGTH
    for seed in range(20, 20 + draws):
        base = probe(BATCH, LENGTH, seed=seed).reseeded(seed)
        for first in (1, 4, LENGTH - 1):
            rows = (sequence == BATCH - 1) & (position >= first)
            yield LATER, base, rows, (sequence == BATCH - 1) & ~rows
        for changed in (BATCH - 1,) if by_place else (0, BATCH - 1):
            yield OTHERS, base, sequence == changed, sequence != changed
        ragged = probe(BATCH, LENGTH, RAGGED, seed=seed).reseeded(seed)
        yield PADDING, ragged, ~ragged.valid, ragged.valid


def _replacements(base: Probe, rows: Bool[Tensor, "T"]) -> Iterator[Probe]:
    """Other tokens at ``rows``: random ones, and crowds that want the experts of one token."""
    yield base.with_rows(rows, probe(BATCH, LENGTH, seed=31), 3.0)
    for token in (0, (BATCH - 1) * LENGTH):
        crowd = base.x[token].expand_as(base.x)
        yield base.with_rows(rows, Probe(crowd, base.context), 2.0)


# -- a model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """``changed`` moved the records of ``layers`` and the next-token logits at ``outputs``."""

    changed: str
    layers: list[str]
    outputs: list[int]

    def __str__(self) -> str:
        layers = f"layers {', '.join(self.layers)}" if self.layers else "no layer"
        outputs = f"outputs at {_span(self.outputs)}" if self.outputs else "no output"
        return f"changing {self.changed} moves the records of {layers} and {outputs}"


def _span(places: list[int]) -> str:
    """Places in words, short where they are a run."""
    if len(places) > 2 and places == list(range(places[0], places[-1] + 1)):
        return f"{places[0]} to {places[-1]}"
    return ", ".join(map(str, places))


def model_moves(subject: Subject, training: bool) -> list[Move]:
    """What changing the last token, the last sequence or padding moves at places that should not
    notice; layers by number, outputs by position.
    """
    model = _model(subject, training)
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    sequence, position = torch.arange(BATCH)[:, None], torch.arange(LENGTH)
    last, ragged = sequence == BATCH - 1, position < torch.tensor(RAGGED)[:, None]
    cases = {
        "the last token": (None, last & (position == LENGTH - 1), 4),
        OTHERS: (None, last & (position >= 0), 3),
        PADDING: (ragged, ~ragged, 2),
    }
    moves = []
    for changed, (valid, places, tries) in cases.items():
        watched = ~places if valid is None else valid
        layers: set[str] = set()
        outputs: set[int] = set()
        plain = _forward(model, ids, valid)
        for _ in range(tries):
            new = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
            other = _forward(model, torch.where(places, new, ids), valid)
            for name, record in plain.router_outputs.items():
                moved = view(other.router_outputs[name]).moved(view(record))
                layers |= {name.split(".")[1]} if (moved & watched.flatten()).any() else set()
            same = torch.isclose(other.logits, plain.logits, rtol=TOLERANCE, atol=TOLERANCE).all(-1)
            outputs |= set((~same & watched).nonzero()[:, 1].tolist())
        if layers or outputs:
            moves.append(Move(changed, sorted(layers), sorted(outputs)))
    return moves


class _Scales(nn.Module):
    """Experts that scale each feature: a row's result does not depend on which rows are beside it,
    not even by rounding, which would decide between experts that tie.
    """

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.scales = nn.Parameter(torch.randn(num_experts, d_model))

    def forward(self, x: Tensor, tokens_per_expert: Tensor, combine_weights: Tensor) -> Tensor:
        return x * self.scales.repeat_interleave(tokens_per_expert, 0) * combine_weights[:, None]

    def expert(self, index: int, x: Tensor, combine_weights: Tensor) -> Tensor:
        return x * self.scales[index] * combine_weights[:, None]


def _model(subject: Subject, training: bool) -> Decoder:
    """A decoder with routers as `Subject.router` makes them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(
            subject.build,
            _Scales,
            vocab_size=VOCAB,
            d_model=D_MODEL,
            num_layers=LAYERS,
            num_heads=2,
            num_kv_heads=1,
            d_ff=16,
            num_experts=NUM_EXPERTS,
            max_positions=LENGTH,
        )
        ids = torch.randint(VOCAB, (BATCH, LENGTH))
    routers = [moe.router for moe in model.moe_layers.values()]
    for router in routers:
        sharpen(router)
    for _ in range(3):
        outputs = _forward(model.train(), ids, None).router_outputs.values()
        for router, output in zip(routers, outputs, strict=True):
            update(router, output)
    return model.train(training)


@torch.no_grad()
def _forward(
    model: Decoder, ids: Int[Tensor, "B S"], valid: Bool[Tensor, "B S"] | None
) -> BackboneOutput:
    flat = None if valid is None else valid.flatten()
    context = probe(len(ids), ids.shape[1]).context
    return model(ids, replace(context, valid=flat, token_ids=ids.flatten()))
