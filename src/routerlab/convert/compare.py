"""Two models on the same tokens: hidden states, routing, logits."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from routerlab.backbones.decoder import Decoder

TOLERANCE = 1e-4  # of a token's largest value; what rounding in float32 leaves is far below
SEQUENCES, LENGTH = 4, 32


@dataclass(frozen=True)
class Seen:
    """What a forward pass shows: the residual stream after each layer, the experts that each token
    uses, in order, [T K] by layer, and the logits.
    """

    hidden: list[Tensor]
    picks: dict[int, Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Difference:
    """The largest absolute value, the largest absolute difference, and the largest difference of a
    token as a share of its own largest value: a few tokens may be far larger than the others.
    """

    size: float
    largest: float
    relative: float

    @property
    def within(self) -> bool:
        """Whether it can be rounding; NaN cannot."""
        return self.relative <= TOLERANCE

    def __str__(self) -> str:
        return f"differ by {self.relative:.2g} of a token's largest value"


@dataclass(frozen=True)
class Comparison:
    """Differences by layer and of the logits, and the share of tokens for which both models pick
    the same experts, by layer; empty where one of the two has no experts.
    """

    hidden: list[Difference]
    logits: Difference
    agreement: dict[int, float]

    @property
    def failures(self) -> list[str]:
        """What is not equal, in words."""
        found = [
            f"layer {i}: hidden states {seen}"
            for i, seen in enumerate(self.hidden)
            if not seen.within
        ]
        found += [
            f"layer {i}: {1 - share:.1%} of the tokens use other experts"
            for i, share in self.agreement.items()
            if share < 1
        ]
        if not self.logits.within:
            found.append(f"logits {self.logits}")
        return found


def random_tokens(vocab_size: int, max_positions: int, seed: int = 0) -> Int[Tensor, "B S"]:
    """A batch of random tokens of the vocabulary."""
    draws = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES, min(LENGTH, max_positions))
    return torch.randint(vocab_size, shape, generator=draws)


def compare(source: Seen, target: Seen) -> Comparison:
    """How far two passes over the same tokens are apart."""
    agreement = {
        layer: float((source.picks[layer] == target.picks[layer]).all(-1).float().mean())
        for layer in sorted(source.picks.keys() & target.picks.keys())
    }
    hidden = [_difference(*pair) for pair in zip(source.hidden, target.hidden, strict=True)]
    return Comparison(hidden, _difference(source.logits, target.logits), agreement)


@torch.no_grad()
def see_decoder(decoder: Decoder, input_ids: Int[Tensor, "B S"]) -> Seen:
    """A pass of ours, in evaluation mode."""
    blocks: Any = decoder.layers
    hidden, picks = [], {}
    with ExitStack() as hooks:
        for number, block in enumerate(blocks):

            def look(module: Any, args: Any, out: Any, number: int = number) -> None:
                hidden.append(out[0])
                if out[1] is not None and out[1].top_k is not None:
                    picks[number] = out[1].expert_indices.view(-1, out[1].top_k).sort().values

            hooks.enter_context(block.register_forward_hook(look))
        logits = decoder.eval()(input_ids).logits
    return Seen(hidden, picks, logits)


@torch.no_grad()
def see_transformers(model: Any, input_ids: Int[Tensor, "B S"]) -> Seen:
    """A pass of a causal language model of transformers, dense or a mixture, in evaluation mode."""
    hidden, picks = [], {}
    with ExitStack() as hooks:
        for number, layer in enumerate(model.model.layers):

            def look(module: Any, args: Any, out: Any) -> None:
                hidden.append(out[0] if isinstance(out, tuple) else out)

            def look_at_router(module: Any, args: Any, out: Any, number: int = number) -> None:
                picks[number] = out[2].sort().values

            hooks.enter_context(layer.register_forward_hook(look))
            if hasattr(layer.mlp, "experts"):
                hooks.enter_context(layer.mlp.gate.register_forward_hook(look_at_router))
        logits = model.eval()(input_ids, use_cache=False).logits
    return Seen(hidden, picks, logits.float())


def _difference(a: Tensor, b: Tensor) -> Difference:
    if a.shape != b.shape:
        return Difference(float("nan"), float("nan"), float("nan"))
    sizes, apart = a.abs().amax(-1).clamp(min=1e-30), (a - b).abs().amax(-1)
    return Difference(float(sizes.max()), float(apart.max()), float((apart / sizes).max()))
