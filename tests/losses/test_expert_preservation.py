"""Imported experts and how far they moved."""

from types import SimpleNamespace

import pytest
import torch

from routerlab.adapters.experts import LoraExperts
from routerlab.losses.expert_preservation import ExpertPreservationLoss


def layer() -> SimpleNamespace:
    torch.manual_seed(0)
    return SimpleNamespace(experts=LoraExperts(d_in=4, d_out=3, num_experts=3, r=2, scaling=1.0))


def test_it_is_the_squared_distance_and_pulls_back() -> None:
    moved = layer()
    moved.experts.remember()
    loss = ExpertPreservationLoss(weight=0.5)
    assert loss.of_layer(moved).item() == 0
    with torch.no_grad():
        moved.experts.lora_A[1, 0, 0] += 3.0
        moved.experts.lora_B[2, 1, 1] -= 4.0
    value = loss.of_layer(moved)
    assert value.item() == pytest.approx(25.0)
    value.backward()
    assert moved.experts.lora_A.grad[1, 0, 0].item() == pytest.approx(6.0)
    assert moved.experts.lora_B.grad[2, 1, 1].item() == pytest.approx(-8.0)
    assert ExpertPreservationLoss(experts=[0, 1]).of_layer(moved).item() == pytest.approx(9.0)


def test_experts_that_were_not_imported_are_refused() -> None:
    with pytest.raises(ValueError, match="experts_from"):
        ExpertPreservationLoss().of_layer(layer())


def test_experts_that_are_not_there_are_refused() -> None:
    found = layer()
    found.experts.remember()
    with pytest.raises(ValueError, match=r"experts=\[3\]: must be from 0 to 2"):
        ExpertPreservationLoss(experts=[3]).of_layer(found)
