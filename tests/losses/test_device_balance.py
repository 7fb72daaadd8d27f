"""DeepSeekMoE's device-level loss by hand."""

import pytest
import torch

from routerlab.core.routing import RouterOutput, StepTotals
from routerlab.losses.device_balance import DeviceBalanceLoss
from routerlab.losses.load_balancing import LoadBalancingLoss
from tests.helpers.records import ex_a, random_record, record
from tests.helpers.step import padded_against_cut, shares_against_whole

P = [0.4, 0.3, 0.2, 0.1]
PICKS = [[0, 1], [0, 1], [0, 2], [0, 3]]  # c = [4,2,1,1]: f = 4 c / 8 = [2,1,.5,.5]


def test_value_by_hand_beside_the_expert_level() -> None:
    output = record([P] * 4, PICKS)
    # experts: .8 + .3 + .1 + .05; devices: f' = [1.5, .5], P' = [.7, .3]: 1.05 + .15
    assert float(LoadBalancingLoss()(output)) == pytest.approx(1.25)
    assert float(DeviceBalanceLoss(num_devices=2)(output)) == pytest.approx(1.20)


def test_gradient_by_hand() -> None:
    probs = torch.tensor([P] * 4, dtype=torch.float64).requires_grad_()
    picks = torch.tensor(PICKS)
    output = RouterOutput.from_top_k(probs.log(), probs, picks, probs.gather(1, picks))
    DeviceBalanceLoss(num_devices=2)(output).backward()
    expected = torch.tensor([[1.5, 1.5, 0.5, 0.5]], dtype=torch.float64) / 4  # f'_g / T
    torch.testing.assert_close(probs.grad, expected.expand(4, 4))


def test_balanced_devices_with_collapsed_experts_score_one() -> None:
    output = record([[0.5, 0.0, 0.5, 0.0]] * 4, [[0, 2]] * 4)
    assert float(DeviceBalanceLoss(num_devices=2)(output)) == pytest.approx(1.0)
    assert float(LoadBalancingLoss()(output)) == pytest.approx(2.0)


def test_one_device_with_all_the_work_scores_their_number() -> None:
    output = record([[0.0, 0.0, 0.0, 0.0, 0.7, 0.3]] * 3, [[4, 5]] * 3)
    assert float(DeviceBalanceLoss(num_devices=3)(output)) == pytest.approx(3.0)


def test_a_device_for_each_expert_is_the_expert_level() -> None:
    output = random_record(9, 6, 2)
    torch.testing.assert_close(
        DeviceBalanceLoss(num_devices=6)(output), LoadBalancingLoss()(output)
    )


def test_counts_are_taken_before_capacity_drops() -> None:
    kept = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    loss = DeviceBalanceLoss(num_devices=2)
    torch.testing.assert_close(loss(ex_a(kept)), loss(ex_a()))


def test_shares_add_up_in_value_and_gradient() -> None:
    (value, grad), (whole, whole_grad) = shares_against_whole(DeviceBalanceLoss(num_devices=2))
    assert whole_grad.abs().max() > 1e-3
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(grad, whole_grad)


def test_padding_changes_nothing() -> None:
    padded, cut = padded_against_cut(DeviceBalanceLoss(num_devices=2))
    torch.testing.assert_close(padded, cut)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"num_devices=3: must divide the 4 experts"):
        DeviceBalanceLoss(num_devices=3)(ex_a())
    with pytest.raises(ValueError, match=r"num_devices=1: must be at least 2"):
        DeviceBalanceLoss(num_devices=1)
    with pytest.raises(ValueError, match=r"weight=-0.1: must be at least 0"):
        DeviceBalanceLoss(weight=-0.1)
    totals = StepTotals(torch.tensor(4.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"device_balance needs totals\.sums"):
        DeviceBalanceLoss()(ex_a(), None, totals)
