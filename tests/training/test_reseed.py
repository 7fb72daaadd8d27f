"""Random numbers of a step depend on the seed and the step alone."""

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from routerlab.core.seeding import stable_seed
from routerlab.training.callbacks.reseed import Reseed
from tests.helpers.models import objective, tiny_batch, tiny_decoder
from tests.helpers.training import fit


class Draw(pl.Callback):
    """Draws from each generator in every step."""

    def __init__(self) -> None:
        self.torch, self.python, self.numpy = [], [], []

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """After `Reseed`, which is before it in the list."""
        self.torch.append(float(torch.rand(())))
        self.python.append(random.random())
        self.numpy.append(float(np.random.rand()))  # noqa: NPY002


def drawn(seed: int, path: Path) -> Draw:
    draw, batches = Draw(), [tiny_batch(2)] * 3
    fit(objective(tiny_decoder(), {}), batches, path, callbacks=[Reseed(seed), draw])
    return draw


def test_a_step_draws_the_same_whatever_was_drawn_before(tmp_path: Path) -> None:
    first = drawn(0, tmp_path)
    _ = torch.rand(7), random.random(), np.random.rand(3)  # noqa: NPY002
    again, other = drawn(0, tmp_path), drawn(1, tmp_path)
    for name in ("torch", "python", "numpy"):
        numbers = getattr(first, name)
        assert numbers == getattr(again, name)
        assert len({*numbers, *getattr(other, name)}) == 6


def test_it_seeds_as_torch_does_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = len(torch.cuda._queued_calls)  # what torch.manual_seed appends to without a GPU
    found = drawn(3, tmp_path).torch
    assert len(torch.cuda._queued_calls) == before
    for step, number in enumerate(found):
        generator = torch.Generator().manual_seed(stable_seed(3, step, 0))
        assert float(torch.rand((), generator=generator)) == number
