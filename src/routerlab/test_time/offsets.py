"""Vectors added to router logits, and gradient descent on them through a frozen model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from routerlab.core.routing import RouterOutput
from routerlab.test_time.plug_in import edited
from routerlab.test_time.prompts import moved_to

Shares = Mapping[str, Float[Tensor, "P"]]


@dataclass(frozen=True, slots=True, eq=False)
class Offsets:
    """An edit that adds a vector to router logits: of each layer in ``by_layer`` [P E], row b of
    the batch gets number ``owner[b]``, at all of its positions.

    With ``at`` it gets it at one token alone, number ``at[b]`` of the ``num_tokens`` of a pass, and
    there too when the text has grown; passes over generated tokens alone stay as they are.
    """

    by_layer: dict[str, Float[Tensor, "P E"]]
    owner: Int[Tensor, "B"]
    at: Int[Tensor, "B"] | None = None
    num_tokens: int = 0

    def __call__(self, name: str, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Router logits with the vectors of this layer added, in float32 or wider."""
        if name not in self.by_layer:
            return logits
        rows = self.by_layer[name][self.owner]
        dtype = torch.promote_types(logits.dtype, rows.dtype)
        if self.at is None:
            sequences = logits.view(len(rows), -1, logits.shape[-1])
            return (sequences.to(dtype) + rows[:, None].to(dtype)).flatten(0, 1)
        at = moved_to(self.at, self.num_tokens, len(logits))
        return logits if at is None else logits.to(dtype).index_add(0, at, rows.to(dtype))


def zeros(backbone: Any, layers: list[str], count: int) -> dict[str, Float[Tensor, "P E"]]:
    """Vectors of zeros for ``count`` sequences, in float32 or wider. ValueError without layers."""
    if not layers:
        raise ValueError(f"{type(backbone).__name__} has no routed layer whose logits could change")
    weight = next(backbone.parameters())
    options: Any = {
        "dtype": torch.promote_types(weight.dtype, torch.float32),
        "device": weight.device,
    }
    experts = {name: backbone.moe_layers[name].router.num_experts for name in layers}
    return {name: torch.zeros(count, number, **options) for name, number in experts.items()}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, gradients are taken, but no parameter asks for one."""
    learning = [p for p in module.parameters() if p.requires_grad]
    module.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def descend(
    backbone: Any,
    offsets: Offsets,
    run: Callable[[], tuple[Float[Tensor, "P"], Mapping[str, RouterOutput]]],
    num_steps: int,
    eta: int | float,
    shares_of: Callable[[Mapping[str, RouterOutput]], Shares],
) -> tuple[Offsets, Float[Tensor, "n P"]]:
    """The offsets after ``num_steps`` steps of plain gradient descent, and the loss of each
    sequence before each step.

    ``run`` gives losses and records of a pass; losses are added, so that sequences do not know of
    each other. ``shares_of`` the first records are factors on the gradients [P] by layer, fixed
    from then on. No gradient is taken below the lowest layer with a share. Raises ValueError where
    the losses do not depend on router logits.
    """
    trace: list[Tensor] = []
    shares: Shares | None = None
    with frozen(backbone):
        for _ in range(num_steps):
            leaves = {name: vectors.detach() for name, vectors in offsets.by_layer.items()}
            for name, vectors in leaves.items():
                vectors.requires_grad_(shares is None or name in shares)
            with edited(backbone, replace(offsets, by_layer=leaves), list(leaves)):
                losses, records = run()
                if not losses.requires_grad:
                    kinds = {type(backbone.moe_layers[name].router).__name__ for name in leaves}
                    raise ValueError(
                        f"{', '.join(sorted(kinds))}: its combine weights do not depend on router "
                        "logits, so no gradient reaches them"
                    )
                if shares is None:
                    found = shares_of(records)
                    shares = {name: share for name, share in found.items() if bool(share.any())}
                names = list(shares)
                wanted = [leaves[name] for name in names]
                # Inside, because checkpointed layers run again.
                gradients = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
            trace.append(losses.detach())
            moved = {
                name: leaves[name].detach() - eta * shares[name][:, None] * gradient
                for name, gradient in zip(names, gradients, strict=True)
                if gradient is not None
            }
            after = {name: vectors.detach() for name, vectors in leaves.items()} | moved
            offsets = replace(offsets, by_layer=after)
    first = next(iter(offsets.by_layer.values()))
    return offsets, torch.stack(trace) if trace else first.new_zeros(0, len(first))
