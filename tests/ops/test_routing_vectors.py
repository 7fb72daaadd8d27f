"""Which prompt tokens stand for a sequence, and the vectors of their routing."""

import pytest
import torch
from torch import Tensor

from routerlab.core.routing import RoutingContext
from routerlab.ops.routing_vectors import routing_vectors, token_positions, used_vectors
from tests.helpers.records import record

LENGTH = 6


def context(real: list[int], prompts: list[int], left: bool) -> RoutingContext:
    """Sequences of so many real tokens, the first of which are a prompt."""
    valid = torch.zeros(len(real), LENGTH, dtype=torch.bool)
    prompt = valid.clone()
    for row, (count, asked) in enumerate(zip(real, prompts, strict=True)):
        start = LENGTH - count if left else 0
        valid[row, start : start + count] = True
        prompt[row, start : start + asked] = True
    return RoutingContext(len(real), LENGTH, valid.flatten(), prompt.flatten())


@pytest.mark.parametrize("left", [True, False])
def test_positions_do_not_depend_on_the_side_of_padding(left: bool) -> None:
    told = context([6, 4, 1], [4, 3, 1], left)
    starts = torch.tensor([0, 2, 5] if left else [0, 0, 0]) + LENGTH * torch.arange(3)
    for token, ranks in {
        "last1": [[3], [2], [0]],
        "first1": [[0], [0], [0]],
        "middle1": [[2], [1], [0]],
        "last3": [[1, 2, 3], [0, 1, 2], [0, 0, 0]],  # short prompts repeat their first token
    }.items():
        expected = starts[:, None] + torch.tensor(ranks)
        assert torch.equal(token_positions(told, token), expected), token


def test_without_a_prompt_all_real_tokens_count() -> None:
    valid = torch.tensor([[False, True, True], [True, True, False]])
    assert token_positions(RoutingContext(2, 3, valid.flatten())).tolist() == [[2], [4]]
    assert token_positions(RoutingContext(2, 3)).tolist() == [[2], [5]]
    nothing = RoutingContext(1, 3, torch.zeros(3, dtype=torch.bool))
    assert token_positions(nothing, "last3").tolist() == [[2, 2, 2]]


def records() -> tuple[dict[str, Tensor], dict[str, object]]:
    leaves = {f"layers.{i:02d}.moe": torch.randn(4, 3 + i, requires_grad=True) for i in range(3)}
    found = {
        name: record(leaf.softmax(-1), leaf.topk(2).indices, valid=torch.tensor([True] * 4))
        for name, leaf in leaves.items()
    }
    return leaves, found


def test_vectors_are_the_full_distributions_with_gradient() -> None:
    leaves, found = records()
    told = RoutingContext(2, 2, prompt=torch.tensor([True, False, True, True]))
    names = list(found)[1:]
    vectors = routing_vectors(found, names, told)
    assert vectors.shape == (2, 4 + 5)
    for row, position in enumerate([0, 3]):
        expected = [found[name].router_probs[position] for name in names]
        torch.testing.assert_close(vectors[row], torch.cat(expected))
    vectors[1, 0].backward()
    assert leaves[names[0]].grad[3].ne(0).all()  # every expert, picked or not
    assert leaves[names[0]].grad[:3].eq(0).all()
    assert leaves["layers.00.moe"].grad is None


def test_several_tokens_give_their_mean_and_half_precision_becomes_single() -> None:
    _, found = records()
    told = RoutingContext(1, 4)
    name = next(iter(found))
    expected = found[name].router_probs[1:].mean(0)
    torch.testing.assert_close(routing_vectors(found, [name], told, "last3")[0], expected)
    low = record([[0.5, 0.5]] * 4, [[0]] * 4)
    low = {"layers.0": type(low)(*[low.router_logits, low.router_probs.bfloat16(),
                                   low.token_indices, low.expert_indices, low.combine_weights,
                                   low.dropped_per_expert])}  # fmt: skip
    assert routing_vectors(low, ["layers.0"], told).dtype == torch.float32


def test_used_vectors_are_zero_off_the_picks() -> None:
    probs, picks = [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], [[0, 1], [2, 1]]
    found = {"layers.0": record(probs, picks)}
    told = RoutingContext(2, 1)
    used = used_vectors(found, ["layers.0"], told)
    torch.testing.assert_close(used, torch.tensor([[0.5, 0.3, 0.0], [0.0, 0.2, 0.7]]).double())


def test_unknown_tokens_are_named() -> None:
    with pytest.raises(ValueError, match="token='last2': must be one of 'last1', 'first1'"):
        token_positions(RoutingContext(1, 2), "last2")
