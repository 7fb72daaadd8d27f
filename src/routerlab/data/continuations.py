"""Windows of running text as prompts and what follows them."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from routerlab.core.checks import within


class Continuations:
    """Held-out windows whose beginning is a prompt: with `prompt` [B S], True on the first
    `prompt_share` of each window (at least a token, and not all), and no target before its end.

    Args:
        data: a `TextDataModule`; its `val_dataloader` is asked for once the trainer runs, which
            then knows what part of the windows is this process's.
        prompt_share: above 0 and below 1.
    """

    def __init__(self, data: Any, prompt_share: int | float) -> None:
        within("prompt_share", prompt_share, 0, 1, above=True, below=True)
        self.data, self.prompt_share = data, prompt_share

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yields the held-out batches."""
        for batch in self.data.val_dataloader():
            shape = batch["input_ids"].shape
            length = min(max(1, math.ceil(self.prompt_share * shape[1])), max(shape[1] - 1, 1))
            places = torch.arange(shape[1], device=batch["labels"].device)
            labels = batch["labels"].masked_fill(places < length - 1, -100)
            yield batch | {"labels": labels, "prompt": (places < length).expand(shape)}

    def __len__(self) -> int:
        """Returns the number of batches."""
        return len(self.data.val_dataloader())
