"""Rows to experts and back: each is the other's gradient."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from routerlab.core.routing import RouterOutput
from routerlab.ops.permute import combine, gather, sort_by_expert
from tests.helpers.records import ex_a, ragged_record, random_record

RECORDS = {
    "top_k": random_record(7, 5, 2),
    "ragged": ragged_record(7, 5),
    "padding": random_record(7, 5, 2, valid=torch.arange(7) % 3 > 0),
    "one token": random_record(1, 5, 3),
    "no assignment": random_record(3, 2, 1, valid=torch.zeros(3, dtype=torch.bool)),
}


def test_order_of_the_running_example() -> None:
    # assignments in token order ask for experts 0 1 0 1 3 2 0 2: expert 0 gets 0, 2, 6, and so on
    by = sort_by_expert(ex_a())
    assert by.order.tolist() == [0, 2, 6, 1, 3, 5, 7, 4]
    assert by.tokens.tolist() == [0, 1, 3, 0, 1, 2, 3, 2]
    assert by.rows is not None
    assert by.rows.tolist() == [[0, 3], [1, 4], [7, 5], [2, 6]]


@pytest.mark.parametrize("num_experts", [256, 257, 40_000])
def test_sorts_any_number_of_experts(num_experts: int) -> None:
    # expert ids at the edges of uint8 and int16 must not wrap around
    picks = torch.tensor([[num_experts - 1], [0], [num_experts // 2], [num_experts - 2]])
    probs = torch.zeros(4, num_experts)
    output = RouterOutput.from_top_k(probs, probs, picks, torch.ones(4, 1))
    assert sort_by_expert(output).tokens.tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("name", RECORDS)
def test_there_and_back_counts_each_token_as_often_as_it_is_sent(name: str) -> None:
    output = RECORDS[name]
    x = torch.randn(len(output.router_logits), 4, dtype=torch.float64)
    by = sort_by_expert(output)
    times = torch.zeros(len(x), dtype=torch.float64)
    times.index_add_(0, output.token_indices, torch.ones_like(output.combine_weights))
    torch.testing.assert_close(combine(gather(x, by), by), x * times[:, None])


def test_there_and_back_is_k_times_x() -> None:
    by = sort_by_expert(random_record(6, 8, 4))
    x = torch.randn(6, 3, dtype=torch.float64)
    assert torch.equal(combine(gather(x, by), by), 4 * x)


@pytest.mark.parametrize("name", RECORDS)
def test_gradients(name: str) -> None:
    output = RECORDS[name]
    by = sort_by_expert(output)
    x = torch.randn(len(output.router_logits), 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(output.expert_indices), 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: gather(x, by), x)
    assert gradgradcheck(lambda x: gather(x, by), x)
    if y.numel():
        assert gradcheck(lambda y: combine(y, by), y)
        assert gradgradcheck(lambda y: combine(y, by), y)


def test_double_backward_of_a_nonlinear_use() -> None:
    by = sort_by_expert(random_record(4, 3, 2))
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: combine(gather(x, by).square(), by), x)
