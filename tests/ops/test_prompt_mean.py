"""The mean of prompts, by hand."""

import torch

from routerlab.core.routing import RoutingContext
from routerlab.ops.prompt_mean import prompt_mean

X = torch.tensor([[1.0], [3.0], [8.0], [torch.nan], [2.0], [6.0]])  # two sequences of three tokens


def test_prompts_padding_and_sequences_without_a_token() -> None:
    valid = torch.tensor([True, True, True, False, True, True])
    prompt = torch.tensor([True, True, False, True, False, False])
    context = RoutingContext(2, 3, valid=valid)
    assert prompt_mean(X, context).tolist() == [[4.0], [4.0]]  # (1 + 3 + 8) / 3, (2 + 6) / 2
    told = RoutingContext(2, 3, valid=valid, prompt=prompt)
    assert prompt_mean(X, told).tolist() == [[2.0], [0.0]]  # (1 + 3) / 2, and padding alone


def test_without_a_context_all_tokens_are_one_sequence_in_float32() -> None:
    found = prompt_mean(X[:3].bfloat16())
    assert found.dtype == torch.float32
    assert found.tolist() == [[4.0]]
