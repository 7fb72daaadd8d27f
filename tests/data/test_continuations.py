"""Windows as prompts and what follows them."""

import pytest
import torch
from torch import Tensor

from routerlab.data.continuations import Continuations


def window(length: int) -> dict[str, Tensor]:
    ids = torch.arange(2 * (length + 1)).view(2, length + 1)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "domain": torch.zeros(2).long()}


class Windows:
    """Data of two batches."""

    def __init__(self, length: int) -> None:
        self.length = length

    def val_dataloader(self) -> list[dict[str, Tensor]]:
        return [window(self.length)] * 2


@pytest.mark.parametrize(
    ("length", "share", "prompt"), [(8, 0.5, 4), (5, 0.5, 3), (8, 0.01, 1), (8, 0.99, 7)]
)
def test_targets_begin_where_the_prompt_ends(length: int, share: float, prompt: int) -> None:
    batches = Continuations(Windows(length), share)
    assert len(batches) == 2
    for batch in batches:
        assert batch["prompt"].sum(1).tolist() == [prompt] * 2
        assert batch["prompt"][:, :prompt].all()
        counted = batch["labels"] != -100
        assert counted.sum(1).tolist() == [length - prompt + 1] * 2
        first = batch["labels"][0][counted[0]][0]
        assert int(first) == prompt  # the token after the prompt


def test_a_share_of_nothing_or_all_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_share=1: must be above 0 and below 1"):
        Continuations(Windows(4), 1)
