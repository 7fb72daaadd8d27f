"""Several processes, as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from routerlab.analysis import trace
from routerlab.cli.main import main
from tests.training.conftest import LORA, REMIX
from tests.training.test_train import rows

PROGRAM = [sys.executable, "-m", "routerlab.cli.main", "train"]


@pytest.mark.slow
def test_two_processes_compute_the_run_of_one(
    train: Callable[..., Path], tiny_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    one = rows(train("name=one", "objective.micro_batches=2"))
    run = tmp_path / "two"
    words = ["trainer=ddp", "trainer.devices=2", "objective.micro_batches=2"]
    subprocess.run([*PROGRAM, *tiny_words(*words, f"run_dir={run}")], check=True, timeout=280)
    check_same_curves(one, rows(run))
    assert (run / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_split_run_that_is_killed_goes_on_and_is_the_run_of_one(
    train: Callable[..., Path], tiny_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    # an odd number of windows: the shares of two processes differ
    shared = ("balancer=expert_bias", "trainer.max_steps=12", "data.max_val_windows=17")
    one, run = train("name=one", *shared), tmp_path / "two"
    words = tiny_words("trainer=fsdp", "trainer.devices=2", *shared, f"run_dir={run}")
    process = subprocess.Popen([*PROGRAM, *words], start_new_session=True)
    deadline = time.time() + 200
    while not (run / "checkpoints" / "step_000004.ckpt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert max(int(row["step"]) for row in rows(run)) < 12
    subprocess.run([*PROGRAM, f"resume={run}"], check=True, timeout=280)
    check_same_curves(rows(one), rows(run))
    assert (run / "report.html").is_file()
    ours, theirs = (json.loads((r / "summary.json").read_text()) for r in (one, run))
    for key in ("parameters", "flops_per_token", "tokens"):
        assert ours[key] == theirs[key]
    found, wanted = (trace.load(r) for r in (run, one))
    assert torch.equal(found.input_ids, wanted.input_ids)
    for name, layer in wanted.layers.items():  # rounding may swap two experts of a token
        same = found.layers[name].expert_indices == layer.expert_indices
        assert same.float().mean() > 0.98
    assert main(["eval", f"run={run}"]) == 0  # in one process
    metrics = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert metrics["val/loss"] == pytest.approx(theirs["val"]["loss"], rel=1e-4)


def check_same_curves(one: list[dict[str, str]], two: list[dict[str, str]]) -> None:
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"]
        for key in a:
            if a[key] and key not in ("step", "train/tokens_per_second"):
                assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4, abs=1e-6), key


@pytest.mark.slow
def test_two_processes_fine_tune_with_a_baseline_as_one_does(
    tuned_run: Path, task_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "two"
    words = ["trainer=ddp", "trainer.devices=2", *REMIX, LORA, f"run_dir={run}"]
    subprocess.run([*PROGRAM, *task_words(*words)], check=True, timeout=280)
    one, two = (json.loads((r / "summary.json").read_text()) for r in (tuned_run, run))
    assert two["base"]["loss"] == pytest.approx(one["base"]["loss"], rel=1e-5)
    assert two["base"]["items"] == two["val"]["items"] == 16
    lora = [found["baselines"]["lora"]["loss"] for found in (one, two)]
    assert lora[0] == pytest.approx(lora[1], rel=1e-4)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
