"""Who gets a slot, by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routerlab.ops.capacity import expert_capacity, within_capacity


@pytest.mark.parametrize(
    ("factor", "num_tokens", "top_k", "num_experts", "slots"),
    [
        (1.25, 10, 2, 4, 7),  # ceil(1.25 * 10 * 2 / 4 = 6.25)
        (1.0, 4, 2, 4, 2),  # the running example: cf 1 -> 2, 1.25 -> 3, 0.5 -> 1
        (1.25, 4, 2, 4, 3),
        (0.5, 4, 2, 4, 1),
        (1.0, 1, 1, 8, 1),  # never 0 for at least one token
    ],
)
def test_expert_capacity(
    factor: float, num_tokens: int, top_k: int, num_experts: int, slots: int
) -> None:
    assert expert_capacity(factor, num_tokens, top_k, num_experts) == slots


def test_first_choices_queue_before_second_choices() -> None:
    # expert 0 is asked by tokens 0, 2 (first) and 1 (second), expert 1 by 1, 0, 2
    picks = torch.tensor([[0, 1], [1, 0], [0, 1]])
    assert within_capacity(picks, 2).tolist() == [[True, True], [True, False], [True, False]]


def test_token_drop_example() -> None:
    # slot-major order keeps one assignment of each token
    picks = torch.tensor([[0, 1], [1, 0]])
    assert within_capacity(picks, 1).tolist() == [[True, False], [True, False]]


def test_padding_takes_no_slot() -> None:
    picks = torch.tensor([[0], [0], [0], [1]])
    valid = torch.tensor([False, True, True, True])
    assert within_capacity(picks, 1, valid[:, None]).tolist() == [[False], [True], [False], [True]]
    assert within_capacity(picks, 1).tolist() == [[True], [False], [False], [True]]


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_equals_the_loop(data: st.DataObject) -> None:
    num_tokens, num_experts = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    top_k, capacity = data.draw(st.integers(1, num_experts)), data.draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    picks = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    valid = torch.rand(num_tokens, generator=generator) < 0.7
    free = [capacity] * num_experts
    expected = torch.zeros_like(picks, dtype=torch.bool)
    for choice in range(top_k):
        for token in range(num_tokens):
            expert = int(picks[token, choice])
            if valid[token] and free[expert] > 0:
                free[expert] -= 1
                expected[token, choice] = True
    assert torch.equal(within_capacity(picks, capacity, valid[:, None].expand_as(picks)), expected)
