"""Steps that are not finite are not taken, also where nobody reads the loss of each step."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from routerlab.core.errors import NonFiniteLossError
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.losses.router_z import RouterZLoss
from routerlab.objectives.finite import FiniteSteps
from routerlab.objectives.optimizer import OptimizerRecipe
from routerlab.objectives.routed import RoutedObjective
from routerlab.objectives.step import Batch
from tests.helpers.models import objective, tiny_batch, tiny_decoder
from tests.helpers.training import fit
from tests.helpers.waiting import WaitsForDevice

FUSED = partial(torch.optim.AdamW, lr=0.1, fused=True)
LOSSES = {"a": LoadBalancingLoss(), "z": RouterZLoss()}


def poisoned(model: RoutedObjective, step: int, monkeypatch: pytest.MonkeyPatch) -> RoutedObjective:
    """The model with a loss that is infinite at one optimizer step (from 1) alone."""
    right = model.task_loss

    def task_loss(logits: Tensor, batch: Batch) -> Tensor:
        losses = right(logits, batch)
        return losses * torch.inf if model.global_step == step - 1 else losses

    monkeypatch.setattr(model, "task_loss", task_loss)
    return model


class Weights(pl.Callback):
    """Those after each step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """After a step."""
        self.found.append(module.backbone.embed_tokens.weight.detach().clone())


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that has to be waited for."""
    monkeypatch.setattr(FiniteSteps, "_would_wait", staticmethod(lambda value: True))


def trained(
    model: RoutedObjective, steps: int, path: Path, message: str | None = None
) -> list[Tensor]:
    weights = Weights()
    batches = [tiny_batch(4, ragged=False, seed=seed) for seed in range(steps)]
    if message is None:
        fit(model, batches, path, callbacks=[weights])
    else:
        with pytest.raises(NonFiniteLossError, match=message):
            fit(model, batches, path, callbacks=[weights])
    return [*weights.found, model.backbone.embed_tokens.weight.detach()]


@pytest.mark.usefixtures("elsewhere")
def test_no_step_is_taken_from_the_first_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = objective(tiny_decoder(), LOSSES, optimizer=OptimizerRecipe(FUSED), log_every=5)
    poisoned(model, 3, monkeypatch)
    weights = trained(model, 9, tmp_path, r"step 3: loss inf, gradient norm nan; .*not taken")
    assert len(weights) == 5  # the fifth step looked
    assert not torch.equal(weights[0], weights[1])
    assert all(torch.equal(weights[1], later) for later in weights[2:])


@pytest.mark.usefixtures("elsewhere")
def test_it_gets_neither_into_a_checkpoint_nor_into_a_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for look in ("on_validation_epoch_start", "on_save_checkpoint"):
        model = objective(tiny_decoder(), {}, optimizer=OptimizerRecipe(FUSED), log_every=50)
        trained(poisoned(model, 2, monkeypatch), 3, tmp_path)
        with pytest.raises(NonFiniteLossError, match="step 2: loss inf"):
            model.on_save_checkpoint({}) if "save" in look else model.on_validation_epoch_start()


@pytest.mark.parametrize("fused", [True, False])
def test_where_reading_is_free_or_the_optimizer_does_not_obey_each_step_is_looked_at(
    fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr(FiniteSteps, "_would_wait", staticmethod(lambda value: True))
    recipe = OptimizerRecipe(partial(FUSED, fused=fused))
    model = poisoned(objective(tiny_decoder(), {}, optimizer=recipe), 2, monkeypatch)
    weights = trained(model, 4, tmp_path, "step 2: loss inf")
    assert len(weights) == 2
    assert torch.equal(weights[0], weights[1])


@pytest.mark.usefixtures("elsewhere")
def test_watching_changes_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for waits in (True, False):
        monkeypatch.setattr(FiniteSteps, "_would_wait", staticmethod(lambda _, waits=waits: waits))
        model = objective(tiny_decoder(), LOSSES, optimizer=OptimizerRecipe(FUSED), log_every=3)
        found.append(trained(model, 5, tmp_path))
    assert all(map(torch.equal, *found))


@pytest.mark.usefixtures("elsewhere")
def test_only_due_steps_wait_for_the_device(tmp_path: Path) -> None:
    class Watched(pl.Callback):
        def __init__(self) -> None:
            self.lines: list[list[str]] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.waits = WaitsForDevice()
            self.waits.__enter__()

        def on_train_batch_end(self, *_: Any) -> None:
            self.waits.__exit__(None, None, None)
            self.lines.append(self.waits.found)

    watched, recipe = Watched(), OptimizerRecipe(FUSED)
    decoder = tiny_decoder(d_ff=8).float()  # as a GPU would run it
    model = objective(decoder, LOSSES, optimizer=recipe, log_every=3, micro_batches=2)
    batches = [tiny_batch(4, ragged=False, seed=seed) for seed in range(6)]
    fit(model, batches, tmp_path, callbacks=[watched])
    assert [bool(lines) for lines in watched.lines] == [False, False, True, False, False, True]
    assert any("finite.py" in line for line in watched.lines[2])  # the watch itself works
