"""Several processes, as a user starts them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.conftest import LORA, REMIX
from tests.training.test_train import rows


@pytest.mark.slow
def test_two_processes_compute_the_run_of_one(
    train: Callable[..., Path], tiny_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    one = rows(train("name=one", "objective.micro_batches=2"))
    run = tmp_path / "two"
    words = ["trainer.devices=2", "trainer.strategy=ddp", "objective.micro_batches=2"]
    program = [sys.executable, "-m", "routerlab.cli.main", "train"]
    subprocess.run([*program, *tiny_words(*words, f"run_dir={run}")], check=True, timeout=280)
    for a, b in zip(one, rows(run), strict=True):
        assert a["step"] == b["step"]
        for key in a:
            if a[key] and key not in ("step", "train/tokens_per_second"):
                assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4, abs=1e-6), key
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_two_processes_fine_tune_with_a_baseline_as_one_does(
    tuned_run: Path, task_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "two"
    words = ["trainer.devices=2", "trainer.strategy=ddp", *REMIX, LORA, f"run_dir={run}"]
    program = [sys.executable, "-m", "routerlab.cli.main", "train"]
    subprocess.run([*program, *task_words(*words)], check=True, timeout=280)
    one, two = (json.loads((r / "summary.json").read_text()) for r in (tuned_run, run))
    assert two["base"]["loss"] == pytest.approx(one["base"]["loss"], rel=1e-5)
    assert two["base"]["items"] == two["val"]["items"] == 16
    lora = [found["baselines"]["lora"]["loss"] for found in (one, two)]
    assert lora[0] == pytest.approx(lora[1], rel=1e-4)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
