"""DeepSeek-V3's sequence-wise loss by hand."""

import pytest
import torch

from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.losses.sequence_balance import SequenceBalanceLoss
from tests.helpers.records import random_record, record
from tests.helpers.step import padded_against_cut, shares_against_whole, top_k_output

SCORES = torch.tensor([[0.8, 0.6, 0.2, 0.4], [0.9, 0.3, 0.6, 0.2]], dtype=torch.float64)


def biased(picks: list[list[int]], **of_record: torch.Tensor) -> RouterOutput:
    """The scores above, of which a biased router picked something else than the best."""
    return record(SCORES / SCORES.sum(-1, keepdim=True), picks, **of_record)


@pytest.mark.parametrize("picks", [[[0, 1], [0, 2]], [[3, 2], [3, 1]]])
def test_value_by_hand_whatever_a_bias_made_the_router_pick(picks: list[list[int]]) -> None:
    # top 2 of the scores {0, 1}, {0, 2}: f = [2,1,1,0], P = [.425,.225,.2,.15]:
    # .85 + .225 + .2 = 1.275
    assert float(SequenceBalanceLoss()(biased(picks))) == pytest.approx(1.275)


def test_counts_go_by_the_logits_and_means_by_the_probabilities() -> None:
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2, dtype=torch.float64)
    picks = torch.tensor([[3, 2], [3, 2]])
    output = RouterOutput.from_top_k(SCORES.log(), probs, picks, probs.gather(1, picks))
    # f = [2,1,1,0] again: .2 + .2 + .3 (by the probabilities it would be 1.4)
    assert float(SequenceBalanceLoss()(output)) == pytest.approx(0.7)


def test_gradient_by_hand() -> None:
    probs = (SCORES / SCORES.sum(-1, keepdim=True)).requires_grad_()
    picks = torch.tensor([[3, 2], [3, 1]])
    output = RouterOutput.from_top_k(probs.detach().log(), probs, picks, probs.gather(1, picks))
    SequenceBalanceLoss()(output).backward()
    # dL/dp = f_i / T = [2, 1, 1, 0] / 2
    expected = torch.tensor([[1.0, 0.5, 0.5, 0.0]], dtype=torch.float64).expand(2, 4)
    torch.testing.assert_close(probs.grad, expected)


def test_equals_load_balancing_by_sequence_where_nothing_biases_the_picks() -> None:
    output, context = random_record(12, 5, 2), RoutingContext(3, 4)
    expected = LoadBalancingLoss(scope="sequence")(output, context)
    torch.testing.assert_close(SequenceBalanceLoss()(output, context), expected)
    assert abs(float(expected - LoadBalancingLoss()(output, context))) > 1e-3


def test_counts_do_not_feel_a_capacity() -> None:
    kept = torch.tensor([[True, True], [False, True]])
    assert float(SequenceBalanceLoss()(biased([[0, 1], [0, 2]], kept=kept))) == pytest.approx(1.275)


def test_the_mean_over_sequences() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64)
    loss = SequenceBalanceLoss()
    halves = [float(loss(top_k_output(part))) for part in logits.split(3)]
    both = loss(top_k_output(logits), RoutingContext(2, 3))
    assert float(both) == pytest.approx(sum(halves) / 2)


@pytest.mark.parametrize("top_k", [None, 2])
def test_shares_add_up_in_value_and_gradient(top_k: int | None) -> None:
    (value, grad), (whole, whole_grad) = shares_against_whole(SequenceBalanceLoss(top_k=top_k))
    assert whole_grad.abs().max() > 1e-3
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(grad, whole_grad)


def test_padding_changes_nothing() -> None:
    padded, cut = padded_against_cut(SequenceBalanceLoss())
    torch.testing.assert_close(padded, cut)


def test_nothing_but_padding_is_worth_nothing() -> None:
    output = random_record(4, 3, 2, valid=torch.zeros(4, dtype=torch.bool))
    assert float(SequenceBalanceLoss()(output, RoutingContext(2, 2))) == 0


def test_k_may_be_given() -> None:
    # K = 1: both tokens' best is expert 0: f = [4,0,0,0], 4 * .425
    output = biased([[0, 1], [0, 2]])
    assert float(SequenceBalanceLoss(top_k=1)(output)) == pytest.approx(1.7)


def test_mistakes_are_named() -> None:
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    ragged = RouterOutput.from_dispatch_mask(SCORES.log(), SCORES, mask, SCORES)
    with pytest.raises(ValueError, match=r"5 picks of 2 tokens.*set top_k"):
        SequenceBalanceLoss()(ragged)
    with pytest.raises(ValueError, match=r"top_k=5: must be at least 1 and at most 4"):
        SequenceBalanceLoss(top_k=5)(ragged)
    with pytest.raises(ValueError, match=r"top_k=0: must be at least 1"):
        SequenceBalanceLoss(top_k=0)
    with pytest.raises(ValueError, match=r"weight=-0.1: must be at least 0"):
        SequenceBalanceLoss(weight=-0.1)
