"""Rules for a number of experts that is not fixed, by hand."""

import pytest
import torch
from torch import Tensor

from routerlab.ops.selection import (
    above_threshold,
    count_above_percentile,
    effective_support_size,
    lower_percentile,
    nucleus,
    softmax_over,
)


def row(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def chosen(mask: Tensor) -> list[int]:
    return mask[0].nonzero().flatten().tolist()


def above_percentile(values: Tensor, share: float) -> Tensor:
    return above_threshold(values, lower_percentile(values, share)[:, None])


def test_above_is_strict_and_never_nobody() -> None:
    assert chosen(above_threshold(row([0.1, 0.4, 0.3, 0.2]), 0.2)) == [1, 2]
    assert chosen(above_threshold(row([0.25] * 4), 0.25)) == [0]  # the first of those that tie
    assert chosen(above_threshold(row([0.1, 0.45, 0.45]), 0.9)) == [1]
    per_token = above_threshold(row([0.1, 0.9]).expand(2, 2), torch.tensor([[0.05], [0.5]]))
    assert per_token.tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize(
    ("num_experts", "counts"),
    [(8, [6, 4, 2, 1]), (4, [3, 2, 1, 1]), (16, [12, 8, 4, 2]), (1, [1, 1, 1, 1])],
)
def test_a_percentile_of_distinct_values_leaves_a_fixed_number(
    num_experts: int, counts: list[int]
) -> None:
    values = torch.randn(300, num_experts)
    for share, count in zip((0.25, 0.5, 0.75, 0.9), counts, strict=True):
        numbers = above_percentile(values, share).sum(-1)
        assert (numbers == count).all()
        assert count_above_percentile(num_experts, share) == count


@pytest.mark.parametrize(("share", "count"), [(1e-6, 7), (0.999999, 1)])
def test_extreme_percentiles(share: float, count: int) -> None:
    # never all: the smallest is not above itself
    assert (above_percentile(torch.randn(100, 8), share).sum(-1) == count).all()


@pytest.mark.parametrize("num_values", [2, 5, 8, 11, 101])
def test_the_linear_percentile_leaves_the_same_values(num_values: int) -> None:
    values = torch.randn(50, num_values, dtype=torch.float64)
    for share in (0.05, 0.295, 0.33, 0.5, 0.77, 0.95):
        linear = torch.quantile(values, share, dim=-1, keepdim=True)
        ours = above_percentile(values, share)
        assert torch.equal(ours, above_threshold(values, linear))
        assert (ours.sum(-1) == count_above_percentile(num_values, share)).all()


def test_neighbouring_floats_do_not_close_the_gap() -> None:
    # interpolation .75 of the way between them rounds to the upper one, which would then fall out
    low = torch.tensor(1.0)
    values = torch.stack([low - 1, low, torch.nextafter(low, low + 1), low + 1])[None]
    linear = torch.quantile(values, 0.58, dim=-1, keepdim=True)
    assert chosen(above_threshold(values, linear)) == [3]
    assert chosen(above_percentile(values, 0.58)) == [2, 3]


def test_a_place_that_misses_a_whole_number_by_rounding() -> None:
    assert 0.29 * 100 < 29
    assert count_above_percentile(101, 0.29) == 71
    assert lower_percentile(torch.arange(101.0), 0.29) == 29


@pytest.mark.parametrize(
    ("probs", "top_p", "changes", "expected"),
    [
        ([0.5, 0.2, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01], 0.65, {}, [0, 1]),
        # sums .46, .66, .8: the crossing expert is the third
        ([0.46, 0.20, 0.14, 0.10, 0.06, 0.04], 0.75, {}, [0, 1, 2]),
        ([0.46, 0.20, 0.14, 0.10, 0.06, 0.04], 0.75, {"include_crossing": False}, [0, 1]),
        ([0.04, 0.20, 0.14, 0.10, 0.06, 0.46], 0.75, {}, [1, 2, 5]),
        ([0.9, 0.06, 0.04], 0.5, {"min_experts": 2}, [0, 1]),
        ([0.25] * 4, 0.9, {"max_experts": 3}, [0, 1, 2]),
        ([0.25] * 4, 1.0, {}, [0, 1, 2, 3]),
        ([0.6, 0.3, 0.1], 0.5, {"include_crossing": False}, [0]),  # sums start above: min_experts
        ([0.6, 0.3, -0.2, -0.4], 0.8, {}, [0, 1]),
    ],
)
def test_nucleus(
    probs: list[float], top_p: float, changes: dict[str, int], expected: list[int]
) -> None:
    assert chosen(nucleus(row(probs), top_p, **changes)) == expected


@pytest.mark.parametrize(
    ("probs", "kept"),
    [
        # DynMoLE (arXiv 2504.00661), top_p .75, at least 2: kept sums .7, .8, .74, .65
        ([0.5, 0.2, 0.1, 0.1, 0.06, 0.04], 2),
        ([0.7, 0.1, 0.08, 0.06, 0.04, 0.02], 2),
        ([0.4, 0.25, 0.09, 0.09, 0.09, 0.08], 3),
        ([0.3, 0.2, 0.15, 0.14, 0.11, 0.10], 3),
    ],
)
def test_sparse_sets_of_dynmole(probs: list[float], kept: int) -> None:
    mask = nucleus(row(probs), 0.75, min_experts=2, include_crossing=False)
    assert chosen(mask) == list(range(kept))


def test_softmax_over_a_mask_is_the_renormalised_softmax() -> None:
    logits = torch.randn(20, 6, dtype=torch.float64)
    mask = above_threshold(torch.rand(20, 6), 0.5)
    picked = torch.where(mask, logits.softmax(-1), 0.0)
    torch.testing.assert_close(softmax_over(logits, mask), picked / picked.sum(-1, keepdim=True))
    # also where the full softmax is 0 on all of the mask
    far = softmax_over(row([1e4, 0.0, 1.0]), torch.tensor([[False, True, True]]))
    torch.testing.assert_close(far, row([0.0, 0.268941, 0.731059]), rtol=0, atol=1e-6)


def test_effective_support_size() -> None:
    weights = torch.tensor([0.022, 0.933, 0.005, 0.010, 0.003, 0.015, 0.005, 0.007])
    assert effective_support_size(weights).item() == pytest.approx(1.1476, abs=1e-4)
    assert effective_support_size(torch.eye(8)).tolist() == [1.0] * 8
    assert effective_support_size(torch.full((8,), 0.125)).item() == pytest.approx(8)
    assert effective_support_size(torch.tensor([0.5, -0.5, 0.0])).item() == pytest.approx(2)
