"""Fine-tuning runs, small: what they leave, what they compare, what they refuse."""

import csv
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import routerlab as rl
from routerlab.cli.main import main
from routerlab.core.config import available, compose
from routerlab.objectives.answers import wilson_interval
from routerlab.training.evaluate import evaluate, load_objective
from routerlab.training.run_directory import RunDirectory
from routerlab.training.summary import print_headline
from routerlab.training.train import train
from tests.training.conftest import LORA, REMIX


def rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").open()))


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


# -- what a run leaves ----------------------------------------------------------------------------


def test_the_summary_has_the_accuracies_of_the_base_the_baseline_and_the_run(
    tuned_run: Path,
) -> None:
    found = summary(tuned_run)
    assert list(found["baselines"]) == ["lora"]
    for part in (found["val"], found["base"], found["baselines"]["lora"]):
        assert part["items"] == 16
        low, high = wilson_interval(16 * part["accuracy"], 16)
        assert part["accuracy_low"] == pytest.approx(low)
        assert part["accuracy_high"] == pytest.approx(high)
        tasks = part["by_task"]
        assert [task["items"] for task in tasks.values()] == [8, 8]
        shares = [task["accuracy"] for task in tasks.values()]
        assert part["accuracy"] == pytest.approx(sum(shares) / 2)
        assert tasks["vowel"]["accuracy_low"] < shares[0] < tasks["vowel"]["accuracy_high"]
    assert found["domains"] == ["vowel", "double"]
    assert found["val"]["loss"] != found["base"]["loss"]
    assert found["baselines"]["lora"]["loss"] != found["val"]["loss"]


def test_the_base_is_the_frozen_model(tuned_run: Path) -> None:
    objective, data, _ = load_objective(RunDirectory.existing(tuned_run))
    data.use_final_items()
    losses, targets = 0.0, 0
    for batch in data.val_dataloader():
        gold = {key: value[batch["gold"]] for key, value in batch.items()}
        context = objective.context(gold, 0, 0)
        with torch.no_grad(), objective.backbone.eval().model.disable_adapter():
            logits = objective.run(gold, context).logits
            losses += float(objective.task_loss(logits, gold).sum())
        targets += int(objective.num_targets(gold).sum())
    assert summary(tuned_run)["base"]["loss"] == pytest.approx(losses / targets, rel=1e-5)


def test_parameters_are_counted(tuned_run: Path) -> None:
    found = summary(tuned_run)
    lora = found["baselines"]["lora"]["parameters"]
    widths = 3 * (32 + 48)  # of the three linears of a feed-forward network
    assert lora["trainable"] == 2 * 4 * widths
    gates = 2 * 4 * (32 + 32 + 48)
    assert found["parameters"]["trainable"] == 2 * 4 * 2 * widths + gates
    idle = 2 * 2 * 2 * widths  # two of four experts of rank 2
    assert found["parameters"]["active"] == found["parameters"]["total"] - idle


def test_layers_have_effective_support_sizes(tuned_run: Path) -> None:
    found = summary(tuned_run)
    assert [layer["layer"] for layer in found["layers"]][0] == "layers.00.mlp.gate_proj"
    assert len(found["layers"]) == 6
    assert found["num_experts"] == [4] * 6
    for layer in found["layers"]:
        assert layer["ess_mean"] == layer["ess_min"] == 2  # K equal weights
        assert 1 < layer["probs_ess_min"] <= layer["probs_ess_mean"] <= 4


def test_training_logs_the_policy_gradient_and_the_support(tuned_run: Path) -> None:
    row = rows(tuned_run)[0]
    for key in ("policy/grad_variance", "policy/snr", "policy/loss_std", "router/mean/ess_mean"):
        assert math.isfinite(float(row[key]))
    last = [row for row in rows(tuned_run) if row["val/accuracy"]]
    assert [row["step"] for row in last] == ["2", "4"]
    assert all(row["val/sampled_loss"] for row in last)
    tokens = summary(tuned_run)["tokens"]
    assert 0 < tokens < 4 * 4 * 48  # padding is none


def test_the_adapter_is_saved_for_peft(tuned_run: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    objective, _, _ = load_objective(RunDirectory.existing(tuned_run))
    config = json.loads((tuned_run / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    model = PeftModel.from_pretrained(base, str(tuned_run / "adapter")).eval()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        expected = objective.backbone.eval()(ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_trace_tells_what_routers_decided_on_real_tokens(tuned_run: Path) -> None:
    found = rl.trace.load(tuned_run)
    assert found.domains == ["vowel", "double"]
    layer = found.layers["layers.01.mlp.down_proj"]
    tokens = layer.token_indices.unique()
    assert len(layer.expert_indices) == 2 * len(tokens)
    assert len(tokens) <= found.input_ids.numel()


def test_a_plain_lora_has_no_layers_and_no_trace(tuned_run: Path) -> None:
    lora = tuned_run / "baselines" / "lora"
    found = summary(lora)
    assert found["layers"] == found["num_experts"] == []
    assert found["top_k"] is None
    assert found["base"] is None  # the main run has measured it
    assert not (lora / "traces").exists()
    assert (lora / "adapter" / "adapter_model.safetensors").is_file()
    assert (lora / "report.html").is_file()


def test_the_headline_names_all(tuned_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_headline(RunDirectory.existing(tuned_run))
    said = capsys.readouterr().out
    for word in ("base model", "lora", "this run", "on 16 items", "by task: vowel", "trainable"):
        assert word in said
    print_headline(RunDirectory.existing(tuned_run / "baselines" / "lora"))
    assert "this run" in capsys.readouterr().out


def test_runs_are_compared(tuned_run: Path) -> None:
    table = rl.compare([tuned_run, tuned_run / "baselines" / "lora"])
    assert table.loc["lora", "val/accuracy"] >= 0
    assert table.loc["lora", "parameters/trainable"] > 0


# -- evaluation -----------------------------------------------------------------------------------


def test_eval_repeats_the_last_evaluation_with_its_interval(
    tuned_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", f"run={tuned_run}"]) == 0
    said, expected = capsys.readouterr().out, summary(tuned_run)["val"]
    found = json.loads((tuned_run / "evaluation.json").read_text())["metrics"]
    assert found["val/loss"] == expected["loss"]
    assert found["val/accuracy_high"] == expected["accuracy_high"]
    share, low, high = (expected[f"accuracy{end}"] for end in ("", "_low", "_high"))
    assert f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})" in said
    assert "vowel" in said


def test_eval_can_take_fewer_items(tuned_run: Path) -> None:
    cfg = compose(f"run={tuned_run}", "max_items=8", config_name="eval")
    assert evaluate(cfg)["metrics"]["val/items"] == 8


# -- every adapter --------------------------------------------------------------------------------

SIZES = {
    "lora": ["adapter.r=2"],
    "poly": ["adapter.num_experts=4", "adapter.r=2"],
    "mhr": ["adapter.num_experts=4", "adapter.r=2", "adapter.num_heads=4"],
    "lora_mixer": ["adapter.num_experts=4", "adapter.r=2"],
}


@pytest.mark.parametrize(
    "adapter", [a for a in available("adapter") if a not in ("mhr_full", "mhr_z", "mhr_mu")]
)
def test_two_steps(adapter: str, tune: Callable[..., Path]) -> None:
    words = SIZES.get(adapter, ["adapter.num_experts=4", "adapter.r=2"])
    if adapter == "remix":
        words = [*words, "adapter.top_k=2", "objective.sample_form=cheap"]
    run = tune(f"adapter={adapter}", *words, "trainer.max_steps=2", "evaluate_base=false")
    found = summary(run)
    assert math.isfinite(found["val"]["loss"])
    assert 0 < found["parameters"]["trainable"] < found["parameters"]["total"]
    assert (run / "report.html").is_file()


def test_skills_are_adapted_to_new_tasks(tune: Callable[..., Path], tuned_run: Path) -> None:
    first = tune("adapter=poly", *SIZES["poly"], "trainer.max_steps=2", "evaluate_base=false")
    trainable = {}
    for mode in ("z", "mu"):
        words = [f"adapter=mhr_{mode}", f"adapter.adapt_from={first / 'adapter'}"]
        run = tune(*words, "trainer.max_steps=2")
        trainable[mode] = summary(run)["parameters"]["trainable"]
        # the base is the frozen model, and not the skills that this adapter starts from
        assert summary(run)["base"]["loss"] == summary(tuned_run)["base"]["loss"]
    assert 0 < trainable["z"] < trainable["mu"]


# -- resuming -------------------------------------------------------------------------------------


def test_a_killed_job_goes_on_with_the_run_that_was_cut_off(
    tuned_run: Path, task_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    words = [*task_words("name=tuned", *REMIX, LORA), f"run_dir={run}"]
    program = [sys.executable, "-m", "routerlab.cli.main", "train"]
    process = subprocess.Popen([*program, *words], stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (run / "checkpoints" / "step_000002.ckpt").exists():
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lora = run / "baselines" / "lora" / "summary.json"
    written = lora.stat().st_mtime_ns
    subprocess.run([*program, f"resume={run}"], check=True, stdout=subprocess.DEVNULL)
    assert lora.stat().st_mtime_ns == written  # a finished baseline is left alone
    found, expected = summary(run), summary(tuned_run)
    for part in ("val", "base"):
        assert found[part] == expected[part]
    assert found["baselines"]["lora"]["loss"] == expected["baselines"]["lora"]["loss"]


def test_other_items_than_before_are_refused(
    task_words: Callable[..., list[str]], task_files: dict[str, Path], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(task_files["vowel"].read_text())
    words = [word for word in task_words("adapter=lora", "name=items") if "data.tasks=" not in word]
    words += [f"data.tasks={{mine: {mine}}}", "trainer.max_steps=2", "evaluate_base=false"]
    run = train(compose(*words), words).path
    mine.write_text(task_files["vowel"].read_text().replace("begins", "starts"))
    with pytest.raises(ValueError, match="not the text that the run was trained on"):
        train(compose(f"resume={run}"), [f"resume={run}"])


# -- baselines ------------------------------------------------------------------------------------


def test_a_baseline_does_without_words_about_the_main_adapter(tuned_run: Path) -> None:
    lora = yaml.safe_load((tuned_run / "baselines" / "lora" / "config.yaml").read_text())
    main_run = yaml.safe_load((tuned_run / "config.yaml").read_text())
    assert lora["adapter"]["_target_"] == "peft.LoraConfig"
    assert "baselines" not in lora
    assert "router" not in lora
    for key in ("data", "objective", "trainer", "seed", "backbone"):
        assert lora[key] == main_run[key]


def test_a_baseline_that_fails_fails_the_job_with_its_name(
    task_words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    wild = "['adapter=lora','optimizer.optimizer.lr=1e30']"
    assert main(["train", *task_words(*REMIX, f"+baselines.wild={wild}", f"run_dir={run}")]) == 1
    said = capsys.readouterr().err
    assert "error: baseline wild: step" in said
    assert f"resume={run}" in said
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert "baseline wild" in status["error"]


def test_a_baseline_of_another_config_is_not_taken_for_this_one(
    tune: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("adapter=lora", "adapter.r=2", "trainer.max_steps=2", "evaluate_base=false")
    run = tune(*words, "+baselines.other=['adapter.r=4']", "name=other")
    assert main(["train", "++baselines.other=['adapter.r=8']", f"resume={run}"]) == 2
    said = capsys.readouterr().err
    assert "baselines.other" in said
    assert "adapter.r: 4 -> 8" in said
