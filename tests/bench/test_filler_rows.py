"""Filler rows keep bf16 products to few sizes and change nothing else."""

import pytest
import torch

from routerlab.experts.swiglu import SwiGLU
from routerlab.ops.permute import combine, few_sizes, gather, sort_by_expert
from tests.helpers.records import ragged_record, random_record

RECORDS = {
    "top_k": random_record(40, 5, 2),
    "ragged": ragged_record(40, 5),
    "padding": random_record(40, 5, 2, valid=torch.arange(40) % 3 > 0),
    "no assignment": random_record(3, 2, 1, valid=torch.zeros(3, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", RECORDS)
def test_output_and_gradients_are_those_without_fillers(name: str) -> None:
    output = RECORDS[name]
    experts = SwiGLU(4, 6, output.num_experts).double()
    x = torch.randn(len(output.router_logits), 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(len(output.expert_indices), dtype=torch.float64, requires_grad=True)
    inputs, dy = (x, weights, *experts.parameters()), torch.randn_like(x)
    found = []
    for fill in (None, few_sizes):
        by = sort_by_expert(output, fill)
        y = combine(experts(gather(x, by), by.tokens_per_expert, by.sort(weights)), by)
        found.append([y, *torch.autograd.grad(y, inputs, dy)])
    for plain, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RECORDS)
def test_every_row_is_where_its_expert_reads_it(name: str) -> None:
    output = RECORDS[name]
    by = sort_by_expert(output, few_sizes)
    assert int(by.tokens_per_expert.sum()) == len(by.order)
    assert bool((by.tokens_per_expert % 16 == 0).all())
    assert bool(((output.tokens_per_expert == 0) == (by.tokens_per_expert == 0)).all())
    expert_of_row = torch.arange(output.num_experts).repeat_interleave(by.tokens_per_expert)
    real = by.order < len(output.expert_indices)
    assert sorted(by.order[real].tolist()) == list(range(len(output.expert_indices)))
    assert torch.equal(output.expert_indices[by.order[real]], expert_of_row[real])
    assert torch.equal(output.token_indices[by.order[real]], by.tokens[real])


@pytest.mark.parametrize(
    ("count", "rows"),
    [(1, 16), (16, 16), (17, 32), (511, 512), (512, 512), (513, 544), (5000, 5120)],
)
def test_sizes(count: int, rows: int) -> None:
    # from 512 rows 32 apart, from 1024 rows 64, ..., from 4096 rows 256
    output = random_record(count, 1, 1)
    assert sort_by_expert(output, few_sizes).tokens_per_expert.tolist() == [rows]
