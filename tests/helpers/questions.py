"""Left-padded batches of prompts and answers, as task data makes them."""

from typing import Any

import torch
from torch import Tensor

from tests.helpers.language_models import VOCAB

END = 0  # of text


def tokens(count: int, seed: int) -> list[int]:
    """Random tokens other than the special ones."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=draws).tolist()


def rows(items: list[tuple[list[int], list[int]]], **marks: list[Any]) -> dict[str, Tensor]:
    """A left-padded batch of prompts and answers (with their end-of-text token)."""
    length = max(len(prompt) + len(answer) - 1 for prompt, answer in items)
    shape = (len(items), length)
    batch = {"input_ids": torch.ones(shape, dtype=torch.long), "labels": torch.full(shape, -100)}
    batch |= {name: torch.zeros(shape, dtype=torch.bool) for name in ("valid", "prompt")}
    for row, (prompt, answer) in enumerate(items):
        start = length - len(prompt) - len(answer) + 1
        batch["input_ids"][row, start:] = torch.tensor((prompt + answer)[:-1])
        batch["labels"][row, length - len(answer) :] = torch.tensor(answer)
        batch["valid"][row, start:] = True
        batch["prompt"][row, start : start + len(prompt)] = True
    task = torch.tensor(marks.pop("task", [0] * len(items)))
    batch |= {"task": task, "domain": task}
    return batch | {name: torch.tensor(values) for name, values in marks.items()}


def training_batch(seed: int = 0) -> dict[str, Tensor]:
    """Four prompts and answers of different lengths."""
    sizes = [(5, 3), (2, 1), (9, 2), (4, 4)]
    return rows([(tokens(p, seed + i), [*tokens(a, i), END]) for i, (p, a) in enumerate(sizes)])
