"""The record: its constructors, what it counts, and what it passes through unharmed."""

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals, count_experts
from tests.helpers.distributed import run_distributed
from tests.helpers.records import ex_a, random_record, record


def weights_by_pair(output: RouterOutput) -> Tensor:
    """[T, E] combine weights, 0 where a token is not sent."""
    dense = torch.zeros_like(output.router_probs)
    return dense.index_put(
        (output.token_indices, output.expert_indices), output.combine_weights, accumulate=True
    )


def test_three_constructors_agree() -> None:
    # a 4 x 4 choice in which every token picks 2 experts and every expert 2 tokens
    picks = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]])
    by_expert = torch.tensor([[0, 2], [0, 3], [1, 2], [1, 3]])
    probs = torch.rand(4, 4, dtype=torch.float64).softmax(-1)
    a = record(probs, picks)
    b = RouterOutput.from_expert_choice(probs.log(), probs, by_expert, probs.T.gather(1, by_expert))
    mask = torch.zeros(4, 4, dtype=torch.bool).scatter_(1, picks, True)
    c = RouterOutput.from_dispatch_mask(probs.log(), probs, mask, probs)
    for other in (b, c):
        assert torch.equal(weights_by_pair(a), weights_by_pair(other))
        assert torch.equal(a.dispatch_mask, other.dispatch_mask)
        assert torch.equal(a.requests_per_expert, other.requests_per_expert)
    assert (a.top_k, b.top_k, c.top_k) == (2, None, None)


def test_counts_of_the_running_example() -> None:
    output = ex_a()  # picks {0,1},{0,1},{3,2},{0,2}
    assert output.tokens_per_expert.tolist() == [3, 2, 2, 1]
    assert output.requests_per_expert.tolist() == [3, 2, 2, 1]
    assert output.expert_load.tolist() == [0.375, 0.25, 0.25, 0.125]
    assert output.num_experts == 4
    assert output.num_dropped == 0
    assert output.token_indices.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]  # token by token


def test_dropped_picks_leave_the_record_but_stay_requested() -> None:
    kept = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    output = ex_a(kept)  # token 1 loses expert 1, token 3 loses expert 0
    assert output.dropped_per_expert.tolist() == [1, 1, 0, 0]
    assert output.num_dropped == 2
    assert output.tokens_per_expert.tolist() == [2, 1, 2, 1]
    assert output.requests_per_expert.tolist() == [3, 2, 2, 1]
    assert output.expert_load.tolist() == [0.375, 0.25, 0.25, 0.125]
    assert output.top_k is None


def test_padding_is_never_dispatched_nor_counted() -> None:
    valid = torch.tensor([True, False, True, False])
    picks = torch.tensor([[0, 1], [0, 1], [3, 2], [0, 2]])
    probs = torch.full((4, 4), 0.25, dtype=torch.float64)
    kept = torch.tensor([[True, False], [False, False], [True, True], [True, True]])
    mask = torch.zeros(4, 4, dtype=torch.bool).scatter_(1, picks, True)
    by_expert = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3]])
    weights = torch.ones(4, 2, dtype=torch.float64)
    outputs = [
        record(probs, picks, valid=valid),
        record(probs, picks, kept=kept, valid=valid),
        RouterOutput.from_dispatch_mask(probs, probs, mask, probs, valid=valid),
        RouterOutput.from_expert_choice(probs, probs, by_expert, weights, valid=valid),
    ]
    for output in outputs:
        assert not output.dispatch_mask[~valid].any()
        assert set(output.token_indices.tolist()) <= {0, 2}
        assert output.top_k is None
        assert len(output.without_padding(output.router_probs)) == 2
    assert outputs[0].requests_per_expert.tolist() == [1, 1, 1, 1]  # tokens 0 and 2
    # only token 0's expert 1 was lost to capacity: token 1's losses are padding
    assert outputs[1].dropped_per_expert.tolist() == [0, 1, 0, 0]
    assert outputs[1].requests_per_expert.tolist() == [1, 1, 1, 1]
    # by_expert: 0 picks {0}, 1 picks {2}, 2 picks {2}, 3 picks {0}; the rest is padding
    assert outputs[3].tokens_per_expert.tolist() == [1, 1, 1, 1]


def test_all_padding_is_an_empty_record() -> None:
    output = random_record(4, 3, 2, valid=torch.zeros(4, dtype=torch.bool))
    assert len(output.expert_indices) == 0
    assert output.expert_load.tolist() == [0, 0, 0]
    assert StepTotals.of(output).num_tokens == 1  # divided by, so never 0


def test_no_sentinels() -> None:
    valid = torch.arange(16) % 3 > 0
    output = random_record(16, 5, 2, valid=valid)
    assert output.expert_indices.min() >= 0
    assert output.expert_indices.max() < 5
    assert len(output.expert_indices) == 2 * int(valid.sum())
    lengths = {len(output.token_indices), len(output.combine_weights), len(output.expert_indices)}
    assert len(lengths) == 1


def test_step_totals_of_one_record() -> None:
    valid = torch.tensor([True, True, False, True, False, False])
    output = random_record(6, 3, 2, valid=valid)
    sums = torch.tensor([1.0, 2.0])
    totals = StepTotals.of(output, RoutingContext(3, 2, valid=valid), sums)
    # sequences [1,1], [0,1], [0,0]: 3 tokens, and 2 sequences that hold one
    assert (totals.num_tokens, totals.num_sequences) == (3, 2)
    assert totals.sums is sums
    totals = StepTotals.of(random_record(6, 3, 2), RoutingContext(3, 2))
    assert (totals.num_tokens, totals.num_sequences) == (6, 3)


def test_count_experts() -> None:
    assert count_experts(torch.tensor([2, 0, 2]), 4).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("value", [ex_a(), RoutingContext(1, 4), StepTotals.of(ex_a())])
def test_frozen(value: object) -> None:
    name = fields(value)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(value, name, None)


def test_pytree_round_trip() -> None:
    valid = torch.tensor([True, True, True, False])
    output = random_record(4, 3, 2, valid=valid)
    leaves, spec = pytree.tree_flatten({"layer": output})
    back = pytree.tree_unflatten(leaves, spec)["layer"]
    for field in fields(RouterOutput):
        before, after = getattr(output, field.name), getattr(back, field.name)
        assert before is after, field.name
    doubled = pytree.tree_map_only(Tensor, lambda t: t * 2 if t.is_floating_point() else t, output)
    assert torch.equal(doubled.combine_weights, 2 * output.combine_weights)
    context = RoutingContext(2, 2, domain_ids=torch.tensor([0, 1]), seed=5, layer=3)
    leaves, spec = pytree.tree_flatten(context)
    back = pytree.tree_unflatten(leaves, spec)
    assert (back.batch_size, back.seed, back.layer, back.valid) == (2, 5, 3, None)


def test_record_fields_carry_gradients_out_of_a_checkpoint() -> None:
    def route(x: Tensor, weight: Tensor) -> tuple[Tensor, RouterOutput]:
        logits = x @ weight.T
        probs = logits.softmax(-1)
        picked = probs.topk(2)
        output = RouterOutput.from_top_k(logits, probs, picked.indices, picked.values)
        return x * 2, output

    x = torch.randn(5, 3, dtype=torch.float64)
    gradients = []
    for recompute in (False, True):
        weight = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3).requires_grad_()
        if recompute:
            y, output = checkpoint(route, x, weight, use_reentrant=False)
        else:
            y, output = route(x, weight)
        assert isinstance(output, RouterOutput)
        value = y.sum() + output.router_logits.square().sum() + output.combine_weights.prod()
        (value + output.router_probs.square().sum()).backward()
        gradients.append(weight.grad)
    assert gradients[0].abs().min() > 0
    assert torch.equal(*gradients)


def _compiled_record(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs and gradients of a compiled and an eager function from record to record."""

    def function(x: Tensor, context: RoutingContext) -> tuple[RouterOutput, Tensor]:
        probs = x.softmax(-1)
        picked = probs.topk(2)
        output = RouterOutput.from_top_k(x, probs, picked.indices, picked.values)
        output = replace(output, combine_weights=output.combine_weights * context.layer)
        return output, output.requests_per_expert

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend=backend)):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        output, counts = run(x, RoutingContext(1, 6, layer=3))
        assert isinstance(output, RouterOutput)
        assert output.top_k == 2
        output.combine_weights.square().sum().backward()
        results.append([output.combine_weights.detach(), output.expert_indices, counts, x.grad])
    return results[0], results[1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_record_passes_through_compile(backend: str, tmp_path: Path) -> None:
    # in a child process: jaxtyping's import hook, on in this one, cannot be traced
    (answer,) = run_distributed(_compiled_record, backend, world_size=1, tmp_path=tmp_path)
    torch.testing.assert_close(answer[0], answer[1], rtol=1e-6, atol=1e-7)


def test_generator_is_stateless_and_differs_by_layer_and_seed() -> None:
    cpu = torch.device("cpu")

    def draw(context: RoutingContext) -> Tensor:
        return torch.rand(4, generator=context.generator(cpu))

    context = RoutingContext(1, 4, seed=7)
    first = draw(context.at_layer(2))
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(first, draw(context.at_layer(2)))
    assert not torch.equal(first, draw(context.at_layer(3)))
    assert not torch.equal(first, draw(replace(context, seed=8).at_layer(2)))


def test_at_layer_changes_the_layer_only() -> None:
    context = RoutingContext(2, 3, seed=4, progress=0.5)
    moved = context.at_layer(9)
    assert (context.layer, moved.layer) == (0, 9)
    assert (moved.batch_size, moved.sequence_length, moved.seed, moved.progress) == (2, 3, 4, 0.5)
