"""Router tuning, small: pretraining, the bank of neighbours, what aligning did, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from routerlab.analysis.neighbour_bank import NeighbourBank
from routerlab.cli.main import main
from routerlab.core.config import compose
from routerlab.training.alignment import FILE
from routerlab.training.evaluate import evaluate, load_objective
from routerlab.training.initial import start_from
from routerlab.training.run_directory import RunDirectory
from routerlab.training.summary import print_headline
from routerlab.training.train import train
from tests.helpers.embedders import save_tiny_embedder
from tests.helpers.language_models import save_tiny, tiny_llama

BEFORE = (
    "pretrain=['objective=finetune','objective.option_score=first_token',"
    "'objective.loss_on=choices','loss=[load_balancing]','backbone.trainable=moe',"
    "'optimizer.optimizer.lr=0.01','trainer.max_steps=3']"
)
TINY = (
    "experiment=roma_quickstart",
    BEFORE,
    "data=jsonl",
    "data.val_rows=answer",
    "data.max_length=48",
    "data.batch_size=8",
    "data.val_batch_size=8",
    "data.val_items=6",
    "data.test_items=10",
    "data.max_items=24",
    "data.max_val_items=6",
    "backbone.layers=2",
    "loss.manifold_alignment.layers=2",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.accelerator=cpu",
    "callback.checkpoint.every_n_steps=2",
    "objective.log_every=1",
    "optimizer.warmup_steps=0",
    "optimizer.optimizer.lr=0.05",
    "trace_sequences=2",
    "logger=[]",
)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions with options that their first letters tell apart."""
    path = tmp_path_factory.mktemp("letters") / "letters.jsonl"
    words = [f"{a}{b}" for a in "abcdefgh" for b in "aeiou"]
    rows = [
        {"prompt": f"{word}: a vowel first? ", "answer": "yes" if word[0] in "ae" else "no",
         "options": ["yes", "no"]} for word in words
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def words(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Command-line words of a run of seconds, with any others added."""
    base = save_tiny(tmp_path_factory.mktemp("base"), tiny_llama(num_hidden_layers=3))
    embedder = save_tiny_embedder(tmp_path_factory.mktemp("embedder"))
    where = [
        f"backbone.path={base}",
        f"embedder={embedder}",
        f"data.tasks={{letters: {letters}}}",
        f"paths.cache_dir={tmp_path_factory.mktemp('cache')}",
        f"paths.output_dir={tmp_path_factory.mktemp('aligned')}",
    ]

    def said(*more: str) -> list[str]:
        return [*TINY, *where, *more]

    return said


@pytest.fixture(scope="module")
def tune(words: Callable[..., list[str]]) -> Callable[..., Path]:
    def run(*more: str) -> Path:
        return train(compose(*words(*more)), words(*more)).path

    return run


@pytest.fixture(scope="module")
def aligned_run(tune: Callable[..., Path]) -> Path:
    """Pretrained, with a baseline without alignment; finished, to look at and not to change."""
    return tune("name=finished")


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Up to rounding: a frozen trunk is kept in the batches in which it was met first."""
    pairs = [(found["val"][key], expected["val"][key]) for key in ("loss", "accuracy")]
    told = found["alignment"], expected["alignment"]
    pairs += [(told[0][w][k], told[1][w][k]) for w in ("before", "after") for k in told[1][w]]
    return all(value == pytest.approx(wanted, rel=1e-4) for value, wanted in pairs)


def weights(run: Path) -> dict[str, torch.Tensor]:
    objective, _, _ = load_objective(RunDirectory.existing(run))
    return dict(objective.backbone.named_parameters())


# -- what a run starts from -----------------------------------------------------------------------


def test_all_start_from_the_pretraining_and_tune_routers_alone(aligned_run: Path) -> None:
    before = weights(aligned_run / "pretrain")
    assert summary(aligned_run / "pretrain")["steps"] == 3
    for run in (aligned_run, aligned_run / "baselines" / "router_tuning"):
        after = weights(run)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {f"layers.{i}.moe.router.gate.weight" for i in (1, 2)}
        saved = torch.load(run / "checkpoints" / "step_000004.ckpt", weights_only=True)
        assert set(saved["state_dict"]) == {f"backbone.{name}" for name in changed}


def test_the_base_is_the_model_after_pretraining(aligned_run: Path) -> None:
    found = summary(aligned_run)
    pretrained = summary(aligned_run / "pretrain")["val"]
    assert found["base"] == pretrained
    assert found["val"]["items"] == 10
    assert list(found["baselines"]) == ["router_tuning"]
    losses = [part["loss"] for part in (found["base"], found["val"], *found["baselines"].values())]
    assert len(set(losses)) == 3


def test_a_run_may_start_from_another_and_so_from_what_that_started_from(
    aligned_run: Path, tune: Callable[..., Path]
) -> None:
    whole = weights(aligned_run)
    objective, _, _ = load_objective(RunDirectory.existing(aligned_run / "pretrain"))
    start_from(objective.backbone, aligned_run)
    own = dict(objective.backbone.named_parameters())
    assert all(torch.equal(own[name], whole[name]) for name in whole)
    again = tune(f"init_from={aligned_run}", "pretrain=[]", "~baselines", "trainer.max_steps=1")
    assert summary(again)["base"] == summary(aligned_run)["val"]


def test_eval_repeats_the_last_evaluation(aligned_run: Path) -> None:
    for run in (aligned_run, aligned_run / "baselines" / "router_tuning"):
        found = evaluate(compose(f"run={run}", config_name="eval"))["metrics"]
        assert found["val/loss"] == summary(run)["val"]["loss"]
        assert found["val/accuracy"] == summary(run)["val"]["accuracy"]


# -- the bank -------------------------------------------------------------------------------------


def test_the_bank_holds_the_training_items_under_the_pretrained_model(aligned_run: Path) -> None:
    bank = NeighbourBank.load(aligned_run / FILE)
    assert bank.embeddings.shape == (24, 16)
    assert bank.routing.shape == (24, 2 * 4)
    objective, data, _ = load_objective(RunDirectory.existing(aligned_run / "pretrain"))
    batch = next(iter(data.each_train_item()))
    with torch.no_grad():
        logits = objective.eval().run(batch, objective.context(batch, 0, 0)).logits
    right = objective.correct(logits, batch)
    assert torch.equal(bank.correct[batch["sample"]], right)
    told = summary(aligned_run)["alignment"]
    assert (told["samples"], told["successful"]) == (24, int(bank.correct.sum()))
    assert told["before"]["accuracy"] == pytest.approx(told["successful"] / 24)


def test_the_summary_tells_what_aligning_did(
    aligned_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = summary(aligned_run)
    plain = found["baselines"]["router_tuning"]["alignment"]
    told = found["alignment"]
    assert told["before"] == plain["before"]
    assert told["before"]["distance"] == NeighbourBank.load(aligned_run / FILE).mean_distance()
    assert told["after"]["distance"] != plain["after"]["distance"]
    assert set(told["after"]) == {"distance", "similarity", "load_entropy", "accuracy"}
    print_headline(RunDirectory.existing(aligned_run))
    said = capsys.readouterr().out
    for word in ("router_tuning", "this run", "base model", "distance to", "before > after"):
        assert word in said


def test_a_resumed_run_has_the_same_bank_and_the_same_end(
    aligned_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "moved"
    shutil.copytree(aligned_run, run)
    for name in ("summary.json", "checkpoints/step_000004.ckpt"):
        (run / name).unlink()
    kept = [run / FILE, run / "pretrain" / "summary.json"]
    written = [path.stat().st_mtime_ns for path in kept]
    train(compose(f"resume={run}"), [f"resume={run}"])
    assert (run / "checkpoints" / "step_000004.ckpt").is_file()
    assert [path.stat().st_mtime_ns for path in kept] == written
    assert same(summary(run), summary(aligned_run))


def test_a_bank_of_another_run_is_taken_where_it_fits(
    aligned_run: Path, tune: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    start = (f"init_from={aligned_run / 'pretrain'}", "pretrain=[]", "~baselines")
    bank = f"bank={aligned_run / FILE}"
    run = tune(*start, bank)
    assert same(summary(run), summary(aligned_run))
    assert not (run / FILE).exists()
    assert f"read from {aligned_run / FILE}" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(ValueError, match="was made from other data.*; model "):
        tune(bank, "init_from=null", "pretrain=[]", "~baselines", "data.max_items=20")


# -- mistakes -------------------------------------------------------------------------------------


ALONE = ("pretrain=[]", "~baselines")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([*ALONE, "init_from=/nowhere"], "init_from='/nowhere': no such directory"),
        ([*ALONE, "pretrain=['objektive=finetune']"], "pretrain: objektive: no such key"),
        ([*ALONE, "pretrain=['trainer.max_steps=0']"], "pretrain: trainer.max_steps=0"),
        ([*ALONE, "pretrain=[1]"], "pretrain=[1]: must be a list of overrides"),
        (
            [*ALONE, BEFORE[:-1] + ",'backbone.num_experts=2']"],
            "pretrain: layers.1.moe.router.gate.weight is [2, 32] there and [4, 32] in this model",
        ),
        (
            ["+baselines.other=['backbone.num_experts=2']"],
            "baselines.other: pretrain: layers.1.moe.router.gate.weight is [4, 32] there",
        ),
        ([*ALONE, "backbone.trainable=moe"], "objective=routing_alignment: trains routers alone"),
        ([*ALONE, "bank=/nowhere"], "bank='/nowhere': not a readable neighbour bank"),
        ([*ALONE, "embedder=/nowhere"], "embedder='/nowhere'"),
        ([*ALONE, "objective=finetune"], "loss.manifold_alignment: needs a bank of neighbours"),
        ([*ALONE, "objective.option_score=sum"], "val_rows=answer: objective.option_score=sum"),
        ([*ALONE, "backbone=pretrained"], "backbone.trainable"),
    ],
)
def test_mistakes_are_named_before_any_training(
    changes: list[str],
    said: str,
    words: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert main(["train", *words(f"run_dir={run}", *changes)]) == 2
    assert said in capsys.readouterr().err
    assert not run.exists()


def test_answers_that_are_generated_have_no_choices(
    words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(f'{{"prompt": "{i} + 1 =", "answer": "{i + 1}"}}\n' for i in range(40)))
    tasks = f"data.tasks={{sums: {path}}}"
    given = [word for word in words(*ALONE) if not word.startswith("data.tasks=")]
    assert main(["train", *given, tasks]) == 2
    said = capsys.readouterr().err
    assert "val_rows='answer': task 'sums': sums.jsonl line" in said
    assert "its answer is generated, not chosen; use val_rows='options'" in said
    assert main(["train", *given, tasks, "data.val_rows=options"]) == 2
    assert "objective.option_score=first_token: task 'sums'" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_named(aligned_run: Path, tmp_path: Path) -> None:
    objective, _, _ = load_objective(RunDirectory.existing(aligned_run))
    with pytest.raises(ValueError, match="holds no run"):
        start_from(objective.backbone, tmp_path)
    copied = tmp_path / "copied"
    shutil.copytree(aligned_run / "pretrain", copied)
    path = copied / "checkpoints" / "step_000003.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["backbone.layers.9.moe.router.gate.weight"] = torch.zeros(4, 32)
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"this model has no layers.9.moe.router.gate.weight \(1 "):
        start_from(objective.backbone, copied)
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(ValueError, match=r"init_from='.*copied': that run has no checkpoint yet"):
        start_from(objective.backbone, copied)


def test_a_run_without_its_pretraining_cannot_be_evaluated(
    aligned_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(aligned_run, moved)
    shutil.rmtree(moved / "pretrain")
    assert main(["eval", f"run={moved}"]) == 2
    assert f"init_from='{moved / 'pretrain'}': no such directory" in capsys.readouterr().err


def test_a_pretraining_that_fails_fails_the_job_with_its_name(
    words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = BEFORE.replace("lr=0.01", "lr=1e30")
    assert main(["train", *words(wild, f"run_dir={tmp_path / 'run'}")]) == 1
    assert "error: pretrain: step" in capsys.readouterr().err
