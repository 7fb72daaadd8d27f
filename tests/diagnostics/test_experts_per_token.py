"""Experts per token on records made by hand."""

import pytest
import torch
from torch import Tensor

from routerlab.core.protocols import Diagnostic
from routerlab.core.routing import RouterOutput
from routerlab.diagnostics.experts_per_token import ExpertsPerToken
from tests.helpers.records import ex_a, ragged_record, random_record

# n = 0, 1, 3, 1 experts for tokens 0 to 3
MASK = [[0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0]]
WEIGHTS = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.5, 0.25, 0.25], [0.4, 0.4, 0.2]]


def hand_record(valid: Tensor | None = None) -> RouterOutput:
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    mask = torch.tensor(MASK, dtype=torch.bool)
    return RouterOutput.from_dispatch_mask(weights.log(), weights, mask, weights, valid=valid)


def measure(*outputs: RouterOutput) -> dict[str, Tensor]:
    """Values of the added sums."""
    total: dict[str, Tensor] = {}
    for output in outputs:
        for key, value in ExpertsPerToken().sums(output).items():
            total[key] = total.get(key, torch.zeros(())) + value.double()
    return ExpertsPerToken().values(total)


def scalars(*outputs: RouterOutput) -> dict[str, float]:
    return {name: value.item() for name, value in measure(*outputs).items() if value.ndim == 0}


def test_by_hand() -> None:
    assert isinstance(ExpertsPerToken(), Diagnostic)
    # n = [0, 1, 3, 1]: mean 5/4; mean square 11/4, less 25/16 = 19/16; weights .3 + 1 + .4
    assert scalars(hand_record()) == pytest.approx(
        {
            "experts_per_token": 1.25,
            "experts_per_token_std": (19 / 16) ** 0.5,
            "uncovered_share": 0.25,
            "weight_sum": 1.7 / 4,
        }
    )
    shares = measure(hand_record())["experts_per_token_shares"]
    assert shares.tolist() == [0.25, 0.5, 0, 0.25]


def test_padding_is_no_uncovered_token() -> None:
    valid = torch.tensor([False, True, True, False])
    # n = [1, 3]
    assert scalars(hand_record(valid)) == pytest.approx(
        {
            "experts_per_token": 2,
            "experts_per_token_std": 1,
            "uncovered_share": 0,
            "weight_sum": 1.3 / 2,
        }
    )


def test_token_choice_has_no_spread() -> None:
    values = scalars(random_record(9, 5, 2))
    assert values["experts_per_token"] == 2
    assert values["experts_per_token_std"] == 0
    assert values["uncovered_share"] == 0


def test_dropped_assignments_do_not_count() -> None:
    kept = torch.tensor([[True, True], [False, True], [False, False], [True, False]])
    values = measure(ex_a(kept))  # n = [2, 1, 0, 1]
    assert values["experts_per_token"].item() == 1
    assert values["experts_per_token_shares"].tolist() == [0.25, 0.5, 0.25, 0, 0]


def test_sums_add_up_over_micro_batches() -> None:
    parts = [ragged_record(7, 4, seed) for seed in range(3)]
    mask = torch.cat([part.dispatch_mask for part in parts])
    probs = torch.cat([part.router_probs for part in parts])
    whole = RouterOutput.from_dispatch_mask(probs.log(), probs, mask, probs)
    assert scalars(*parts) == pytest.approx(scalars(whole))
    number = mask.sum(1).double()
    assert scalars(whole)["experts_per_token_std"] == pytest.approx(number.std(correction=0).item())
    assert measure(*parts)["experts_per_token_shares"].sum().item() == pytest.approx(1)


def test_nothing_but_padding() -> None:
    values = measure(hand_record(torch.zeros(4, dtype=torch.bool)))
    assert all(value.isfinite().all() for value in values.values())
