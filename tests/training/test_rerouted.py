"""``routerlab eval test_time=...``: a run's held-out data without and with changed routing."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from routerlab.analysis.neighbour_bank import NeighbourBank
from routerlab.cli.main import main
from routerlab.core.config import ConfigError, available, compose
from routerlab.training.evaluate import evaluate, load_objective
from routerlab.training.run_directory import RunDirectory
from routerlab.training.train import train
from tests.helpers.language_models import save_tiny
from tests.training.conftest import TINY_TASKS


def outcome(run: Path, *words: str) -> dict[str, Any]:
    return evaluate(compose(f"run={run}", *words, config_name="eval"))


def test_every_plug_in_has_a_config() -> None:
    assert available("test_time") == ["c3po", "identity", "oracle", "rewiring", "steering"]


def test_identity_repeats_every_number(finished_run: Path) -> None:
    found = outcome(finished_run, "test_time=identity")
    assert found["test_time"]["metrics"] == found["metrics"]
    assert found["test_time"]["distributions"] == found["distributions"]
    assert found["test_time"]["cost"]["forward_passes"] == 0
    saved = json.loads((finished_run / "evaluation.json").read_text())
    assert saved["test_time"]["plug_in"]["_target_"].endswith("Identity")
    assert saved["seconds"] > 0
    assert saved["test_time"]["seconds"] > 0


def test_only_what_follows_the_prompt_is_scored(finished_run: Path) -> None:
    found = outcome(finished_run, "test_time=identity", "prompt_share=0.25", "max_val_windows=16")
    objective, data, _ = load_objective(RunDirectory.existing(finished_run))
    losses, count = 0.0, 0
    for batch in data.val_dataloader():
        with torch.no_grad():
            logits = objective.run(batch, objective.context(batch, 4, 0)).logits
        after = objective.task_loss(logits, batch)[:, 7:]  # of windows of 32 tokens
        losses, count = losses + float(after.sum()), count + after.numel()
    assert found["metrics"]["val/loss"] == pytest.approx(losses / count, rel=1e-5)


def test_text_is_rerouted_and_both_are_shown(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["test_time=rewiring", "test_time.eta=5", "test_time.num_steps=2", "max_val_windows=16"]
    assert main(["eval", f"run={finished_run}", *words]) == 0
    said = capsys.readouterr().out
    found = json.loads((finished_run / "evaluation.json").read_text())
    plain, moved = found["metrics"], found["test_time"]["metrics"]
    assert plain["val/loss"] != moved["val/loss"]
    for value in (plain["val/loss"], moved["val/bits_per_byte"], math.exp(moved["val/loss"])):
        assert f"{value:.4f}" in said
    cost = found["test_time"]["cost"]
    assert cost["forward_passes"] == cost["backward_passes"] == 4  # 2 batches, 2 steps
    assert cost["tokens"] == 2 * 16 * 16
    assert "4 extra forward and 4 backward passes, 512 tokens" in said
    assert "Rewiring" in said
    assert found["test_time"]["uses_answer"] is False


def test_steering_by_a_mapping(finished_run: Path) -> None:
    words = ["test_time=steering", "test_time.experts={0: [1], 1: [2]}", "test_time.form=soft"]
    found = outcome(finished_run, *words, "max_val_windows=16")
    assert found["metrics"]["val/loss"] != found["test_time"]["metrics"]["val/loss"]


@pytest.fixture(scope="module")
def letters_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of LoRA experts on questions whose options differ in their first token."""
    folder = tmp_path_factory.mktemp("letters")
    words = [f"{a}{b}{c}" for a in "abcd" for b in "eiou" for c in "xyz"]
    items = [
        {"prompt": f"{w} has e: ", "answer": "y" if "e" in w else "n", "options": ["y", "n"]}
        for w in words
    ]
    file = folder / "letters.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    overrides = [
        *TINY_TASKS,
        "adapter=mixlora",
        "adapter.r=2",
        "adapter.num_experts=4",
        "router.init_std=1.0",
        "optimizer.optimizer.lr=0.03",
        "objective.option_score=first_token",
        f"backbone.path={save_tiny(folder / 'base')}",
        f"data.tasks={{letters: {file}}}",
        f"paths.cache_dir={Path('~/.cache/routerlab').expanduser()}",
        f"run_dir={folder / 'run'}",
    ]
    return train(compose(*overrides), overrides).path


def test_adapters_are_rerouted_on_tasks(
    letters_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name for p in letters_run.iterdir()}
    weights = load_objective(RunDirectory.existing(letters_run))[0].state_dict()
    words = ["test_time=oracle", "test_time.eta=1000", "test_time.layers=2", "max_items=4"]
    assert main(["eval", f"run={letters_run}", *words]) == 0
    said = capsys.readouterr().out
    assert "Oracle (uses the answer: a bound, no result)" in " ".join(said.split())
    found = json.loads((letters_run / "evaluation.json").read_text())
    assert found["metrics"] != found["test_time"]["metrics"]
    assert found["test_time"]["metrics"]["val/items"] == 4
    again = load_objective(RunDirectory.existing(letters_run))[0].state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert {p.name for p in letters_run.iterdir()} - before <= {"evaluation.json"}


def test_neighbours_come_from_the_training_items(letters_run: Path) -> None:
    words = ["test_time=c3po", "test_time.layers=2", "max_items=4"]
    found = outcome(letters_run, *words, "test_time.alpha=1")
    assert found["test_time"]["preparation_seconds"] > 0
    assert found["metrics"] != found["test_time"]["metrics"]
    file = letters_run / "c3po_bank.safetensors"
    bank, made = NeighbourBank.load(file), file.stat().st_mtime_ns
    assert len(bank.correct) == 34
    assert 0 < bank.num_correct < 34
    outcome(letters_run, *words)
    outcome(letters_run, *words, f"test_time.bank={file}")
    assert file.stat().st_mtime_ns == made
    outcome(letters_run, "test_time=c3po", "test_time.layers=1", "max_items=4")
    assert len(NeighbourBank.load(file).layers) == 1
    other = {**bank.fingerprint, "data": {"tasks": {"letters": {"test": 3}}}}
    replace(bank, fingerprint=other).save(letters_run.parent / "other")
    with pytest.raises(ConfigError, match=r"was made from other tasks.letters.*test \(3, not"):
        outcome(letters_run, *words, f"test_time.bank={letters_run.parent / 'other'}")


def test_a_choice_that_logits_do_not_weigh_cannot_be_tuned(
    tuned_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", f"run={tuned_run}", "test_time=rewiring", "max_items=2"]) == 2
    assert "no gradient reaches them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test_time=rewire"], "test_time=rewire: no such config; did you mean 'rewiring'"),
        (["test_time=rewiring", "test_time.steps=3"], "test_time.steps: no such key"),
        (["test_time=rewiring", "test_time.eta=-1"], "eta=-1: must be at least 0"),
        (["test_time=rewiring", "test_time.eta=big"], "test_time.eta='big'"),
        (["test_time=steering"], "test_time.experts: must be given a value"),
        (["test_time=steering", "test_time.experts={7: [0]}"], "layers [7] are not routed"),
        (["test_time=c3po"], "test_time=c3po: follows prompts that were answered rightly"),
        (["test_time=oracle"], "layers=5: must be from 1 to the 2"),
        (["test_time=identity", "prompt_share=1"], "prompt_share=1: must be above 0 and below 1"),
    ],
)
def test_mistakes_are_named(
    words: list[str], message: str, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", f"run={finished_run}", "max_val_windows=16", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
