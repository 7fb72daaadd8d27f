"""`routerlab bench training`: rivals that train the same model, turns, start-up, the file."""

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.bench import start_up, training, training_report
from routerlab.bench.command import main
from routerlab.bench.layer import Settings
from routerlab.bench.start_up import StartUp
from routerlab.bench.step_size import StepSize
from routerlab.bench.training_loops import (
    BARE,
    OURS,
    TRANSFORMERS,
    Loop,
    bare_loss,
    transformers_loss,
    transformers_model,
)
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.losses.router_z import RouterZLoss
from tests.helpers.models import objective, tiny_batch, tiny_decoder
from tests.helpers.training import fit

SIZE = StepSize(256, 16, 2, 2, 4, 2, 16, batch_size=2, sequence_length=16)
LOSSES = {"load_balancing": LoadBalancingLoss(weight=0.3), "router_z": RouterZLoss(weight=0.2)}
WEIGHTS = {"load_balancing": 0.3, "router_z": 0.2}


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_bare_loop_trains_as_ours_does(tmp_path: Path) -> None:
    model = objective(tiny_decoder(), LOSSES)
    start, alone = flat(model.backbone), copy.deepcopy(model.backbone)
    batches = [tiny_batch(4, ragged=False, seed=seed) for seed in (1, 2, 3)]
    loop = Loop(alone, bare_loss(WEIGHTS), model.recipe, len(batches), clip=1.0)
    fit(model, batches, tmp_path)
    for batch in batches:
        loop.step(batch)
    assert (flat(alone) - start).abs().max() > 1e-3
    torch.testing.assert_close(flat(alone), flat(model.backbone))


def test_the_model_of_transformers_has_the_same_sizes() -> None:
    decoder = tiny_decoder(qk_norm=True, d_ff=8)
    theirs: Any = transformers_model(decoder)
    shapes = [sorted(tuple(p.shape) for p in each.parameters()) for each in (theirs, decoder)]
    assert shapes[0] == shapes[1]
    assert theirs.config._experts_implementation == "grouped_mm"
    batch = tiny_batch(2, ragged=False)
    assert transformers_loss(0.5)(theirs, batch) > transformers_loss(0.0)(theirs, batch)
    before = flat(theirs)
    Loop(theirs, transformers_loss(0.5), objective(decoder, {}).recipe, 3, 1.0).step(batch)
    assert not torch.equal(before, flat(theirs))


@pytest.fixture(scope="module")
def found(tiny_words: Callable[..., list[str]]) -> training.TrainingFound:
    words = [w for w in tiny_words() if w.startswith(("data=", "data.domains=", "paths."))]
    words += ["data.val_batch_size=8", "objective.log_every=2"]
    return training.bench_training(SIZE, Settings(1e-3, torch.device("cpu")), False, words)


def test_contestants_take_turns_in_a_real_training(found: training.TrainingFound) -> None:
    rows = {row.name: row for row in found.rows}
    assert list(rows) == [BARE, OURS, TRANSFORMERS]
    assert rows[BARE].ratio == 1
    for row in found.rows:
        assert row.samples == 3
        assert 0 < row.milliseconds < 1000
        assert row.tokens_per_second == pytest.approx(32_000 / row.milliseconds)
    assert rows[OURS].ratio > 0.8
    assert found.to_transformers == rows[OURS].ratio / rows[TRANSFORMERS].ratio
    assert found.share.milliseconds > 0
    assert found.start_up is None


def test_what_was_found_is_told(found: training.TrainingFound) -> None:
    start = StartUp(9.0, 8.5, 9.5, 5.0, 6.0, 2.0, 1.0, 3)
    whole = dataclasses.replace(found, start_up=start)
    said = "\n".join(training_report.training_lines(whole))
    assert "start-up: 9.0 s to the first step (8.5 to 9.5 in 3 processes; goal 8, not met)" in said
    assert "times as long as transformers (goal: below 1" in said
    assert "goal: 5 %" in said
    wide = dataclasses.replace(whole, size=dataclasses.replace(SIZE, d_model=1024))
    assert "goal: 3 %" in "\n".join(training_report.training_lines(wide))
    table = training_report.training_table(whole)
    assert table.row_count == 3
    told = training_report.training_json(whole, Settings(1.0, torch.device("cpu")))
    assert json.loads(json.dumps(told))["met"]["start-up"] is False
    assert {"environment", "size", "rows", "share", "start_up", "percent"} <= set(told)


def test_the_first_step_is_marked(train: Callable[..., Path], tmp_path: Path) -> None:
    file, launched = tmp_path / "marks.json", time.time()
    callback = "{_target_: routerlab.bench.first_step.FirstStep, file: '" + str(file) + "'}"
    train("trainer.max_steps=2", f"+callback.first_step={callback}")
    marks = json.loads(file.read_text())
    assert list(marks) == ["built", "set up", "stepped"]
    walls, processes = zip(*marks.values(), strict=True)
    assert launched < walls[0] < walls[1] < walls[2] < time.time()
    assert 0 < processes[0] < processes[1] < processes[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--top-k", "9"], "top_k=9: must be from 2"),
        (["--d-model", "0"], "d_model=0: must be at least 1"),
        (["--num-heads", "3"], "num_heads=3: must cut d_model=128"),
        (["--num-kv-heads", "3"], "num_kv_heads=3: must divide num_heads=4"),
        (["--seconds", "0"], "--seconds=0.0: must be above 0"),
    ],
)
def test_bad_input(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["training", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_writes_all_that_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_words: Callable[..., list[str]]
) -> None:
    monkeypatch.setattr(start_up, "_ROUNDS", 1)
    words = [w for w in tiny_words() if w.startswith(("data=", "data.domains=", "paths."))]
    monkeypatch.setattr(training, "_WORDS", (*training._WORDS, *words, "data.val_batch_size=8"))
    file = tmp_path / "bench.json"
    small = ["--d-model", "16", "--num-layers", "2", "--d-ff", "16", "--batch-size", "2"]
    assert main(["training", *small, "--seconds", "0.1", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert told["start_up"]["imports"] > 0  # of a process of its own
    assert 0 < told["start_up"]["before_run"] < told["start_up"]["seconds"]
    assert set(told["met"]) == {"bare loop", "transformers", "losses and diagnostics", "start-up"}
