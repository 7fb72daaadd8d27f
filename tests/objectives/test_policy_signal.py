"""Norm, variance and signal-to-noise ratio of policy gradients."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routerlab.objectives.policy_signal import PolicySignal
from routerlab.objectives.sampling import Samples
from routerlab.objectives.step import split_batch
from routerlab.routers.subset_sampling import SubsetSampling
from tests.helpers.models import objective, tiny_batch, tiny_decoder
from tests.helpers.training import Remember, fit


def samples(losses: list[list[float]], num_targets: list[int]) -> Samples:
    """M rows of B losses, as sequences of one position."""
    values = torch.tensor(losses, dtype=torch.float64)[:, :, None]
    return Samples(values, torch.zeros_like(values), torch.tensor(num_targets))


def measured(coefficients: Tensor, micro_batches: int = 1) -> dict[str, float]:
    """Of sequences whose gradients are the rows."""
    weight = nn.Parameter(torch.zeros(coefficients.shape[1], dtype=torch.float64))
    signal = PolicySignal([weight], micro_batches)
    signal.measure(coefficients @ weight)
    weight.grad = coefficients.sum(0)
    return signal.values()


def test_by_hand() -> None:
    # sums of gradients (3, 1): norm 10; mean (1, 1/3), squared distances 14/3 and 2/3,
    # times n / (n - 1) = 3/2
    found = measured(torch.tensor([[0.0, 0], [3, 1], [0, 0]], dtype=torch.float64))
    variance = 1.5 * (6 + 2 / 3)
    assert found == pytest.approx({
        "policy/grad_norm": 10**0.5,
        "policy/grad_variance": variance,
        "policy/snr": (10 - variance) / variance,
    })  # fmt: skip


def test_more_than_eight_sequences_come_in_groups() -> None:
    rows = torch.randn(20, 3, dtype=torch.float64)
    groups = torch.stack([group.sum(0) for group in rows.tensor_split(8)])
    assert measured(rows) == pytest.approx(measured(groups))


def test_a_step_of_more_micro_batches_has_more_of_both() -> None:
    rows = torch.randn(6, 3, dtype=torch.float64) + 1
    one, four = measured(rows), measured(rows, micro_batches=4)
    assert four["policy/grad_variance"] == pytest.approx(4 * one["policy/grad_variance"])
    assert four["policy/snr"] == pytest.approx(4 * one["policy/snr"])


def test_unbiased() -> None:
    # 8 sequences with mean gradient (.5, 0) and variance 1 in each of 2 directions: the sum has
    # variance 16 and squared mean 16; 400 draws put 3 standard deviations near 1.5 and 3
    generator = torch.Generator().manual_seed(0)
    variances, squares = [], []
    for _ in range(400):
        rows = torch.randn(8, 2, dtype=torch.float64, generator=generator)
        rows[:, 0] += 0.5
        found = measured(rows)
        variances.append(found["policy/grad_variance"])
        squares.append(found["policy/snr"] * found["policy/grad_variance"])
    assert sum(variances) / 400 == pytest.approx(16, abs=1.5)
    assert sum(squares) / 400 == pytest.approx(16, abs=3)


def test_no_noise_and_no_signal() -> None:
    zeros = measured(torch.zeros(4, 2, dtype=torch.float64))
    assert set(zeros.values()) == {0.0}
    single = measured(torch.ones(1, 2, dtype=torch.float64))  # one sequence says nothing
    assert single == pytest.approx({"policy/grad_norm": 2**0.5})


def test_spread_of_losses() -> None:
    signal = PolicySignal([nn.Parameter(torch.zeros(1))], 2)
    signal.add(samples([[1.0, 5], [4, 5], [1, 5]], [3, 2]))
    signal.add(samples([[0.0, 7], [1, 9], [2, 0]], [1, 0]))  # the second has no target
    found = signal.values()
    # deviations 3**.5, 0, 1; ranges 3, 0, 2
    assert found["policy/loss_std"] == pytest.approx((3**0.5 + 1) / 3)
    assert found["policy/loss_range"] == pytest.approx(5 / 3)


# -- in a step ------------------------------------------------------------------------------------


def take_step(form: str, micro_batches: int = 1, **changes: Any) -> dict[str, float]:
    router = partial(SubsetSampling, init_std=1.0)
    model = objective(tiny_decoder(router=router, **changes), {}, sample_form=form, num_samples=3)
    parts = split_batch(tiny_batch(), micro_batches)
    contexts = [model.context(part, 0, i) for i, part in enumerate(parts)]
    terms = model.accumulate(parts, contexts, due=True)[0]
    total = torch.cat([p.grad.flatten() for p in model.policy]).norm()
    assert terms["policy/grad_norm"] == pytest.approx(float(total))
    assert "policy/snr" not in model.accumulate(parts, contexts, due=False)[0]
    return {key: value for key, value in terms.items() if key.startswith("policy/")}


def test_all_forms_measure_the_same() -> None:
    found = take_step("replicated")
    assert sorted(found) == [
        "policy/grad_norm",
        "policy/grad_variance",
        "policy/loss_range",
        "policy/loss_std",
        "policy/snr",
    ]
    assert found["policy/grad_variance"] > 0
    assert found["policy/loss_range"] > found["policy/loss_std"] > 0
    assert take_step("looped", activation_checkpointing=True) == pytest.approx(found)
    assert take_step("cheap") == pytest.approx(found)
    assert take_step("cheap", micro_batches=2).keys() == found.keys()


def test_they_are_logged(tmp_path: Path) -> None:
    router, remember = partial(SubsetSampling, init_std=1.0), Remember()
    model = objective(tiny_decoder(router=router), {}, log_every=2)
    fit(model, [tiny_batch(4)] * 2, tmp_path, callbacks=[remember])
    assert remember.results[1]["scalars"]["policy/grad_variance"] > 0
    assert "scalars" not in remember.results[0]
