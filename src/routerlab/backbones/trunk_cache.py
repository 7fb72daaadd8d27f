"""What frozen layers make of a sequence, kept: they make the same of it each time."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class TrunkCache:
    """Hidden states above a model's first layers, by the real tokens of their sequences. They are
    kept in memory: tokens x D numbers. A plain object, no part of any state.

    Sequences come out as the layers give them up to rounding, since they first ran beside others
    and behind other padding; the states of padding are 0.

    Args:
        depth: how many layers are below.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._known: dict[bytes, Float[Tensor, "n D"]] = {}

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Int[Tensor, "B S"],
        valid: Bool[Tensor, "B S"],
        run: Callable[[Int[Tensor, "b S"], Bool[Tensor, "b S"]], Float[Tensor, "b S D"]],
    ) -> Float[Tensor, "B S D"]:
        """The states of a batch; ``run`` computes those of the sequences not met before."""
        rows = zip(input_ids.cpu(), valid.cpu(), strict=True)
        keys = [ids[real].numpy().tobytes() for ids, real in rows]
        fresh = {key: row for row, key in enumerate(keys) if key not in self._known}
        if fresh:
            places = torch.tensor(list(fresh.values()), device=input_ids.device)
            states = run(input_ids[places], valid[places])
            for key, state, real in zip(fresh, states, valid[places], strict=True):
                self._known[key] = state[real].clone()
        found = torch.cat([self._known[key] for key in keys])
        states = found.new_zeros(*input_ids.shape, found.shape[-1])
        states[valid] = found
        return states
