"""The command line's first answers."""

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import routerlab as rl
from routerlab.cli.main import COMMANDS, main

HEAVY = ("torch", "lightning", "hydra", "transformers", "datasets", "wandb")


@pytest.mark.parametrize("words", [["--help"], ["routers"], ["adapters"], []])
def test_first_answers_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from routerlab.cli.main import main; code = main(sys.argv[1:]); "
        f"print([m for m in {HEAVY} if m in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {command} " in said for command in COMMANDS)


def test_routers_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == rl.available("router")
    assert all(len(line.split()) > 4 for line in lines)


def test_adapters_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == rl.available("adapter")
    assert all(len(line.split()) > 4 for line in lines)


def test_an_unknown_command_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "'trian'; did you mean 'train'" in capsys.readouterr().err


def test_the_whole_config_can_be_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["routerlab", "train"])
    with pytest.raises(SystemExit):
        main(["train", "--cfg", "nonsense"])
    done = subprocess.run(
        [sys.executable, "-m", "routerlab.cli.main", "train", "--cfg", "job"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "num_experts: 8" in done.stdout
    assert "hydra:" not in done.stdout


def test_a_missing_config_directory_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routers", "--config-dir", "/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_eval_repeats_the_validation_of_the_run(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", f"run={finished_run}"]) == 0
    said = capsys.readouterr().out
    summary = json.loads((finished_run / "summary.json").read_text())
    found = json.loads((finished_run / "evaluation.json").read_text())
    assert found["metrics"]["val/bits_per_byte"] == pytest.approx(summary["val"]["bits_per_byte"])
    assert f"{summary['val']['bits_per_byte']:.4f}" in said
    assert "step_000004.ckpt" in said


def test_eval_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], train: Callable[..., Path], tmp_path: Path
) -> None:
    assert main(["eval"]) == 2
    assert "run" in capsys.readouterr().err
    assert main(["eval", f"run={tmp_path}"]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_with_its_layer_and_checkpoint(
    tiny_words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["optimizer.optimizer.lr=1e30", "optimizer.warmup_steps=0"]
    words += ["callback.checkpoint.every_n_steps=1", f"run_dir={tmp_path / 'nan'}"]
    assert main(["train", *tiny_words(*words)]) == 1
    said = capsys.readouterr().err
    assert "router logits" in said
    assert "last good checkpoint" in said
    assert "Traceback" not in said


def test_doctor_finds_this_machine_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in ("torch", "cores", "grouped products", "wandb", "offline"):
        assert word in said
    assert said.count("ok ") == 3
    assert "FAILED" not in said


@pytest.mark.parametrize(
    ("sent", "code", "state"), [(signal.SIGINT, 130, "failed"), (signal.SIGTERM, 143, "preempted")]
)
def test_a_signal_ends_a_run_that_can_go_on(
    sent: signal.Signals,
    code: int,
    state: str,
    tiny_words: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "stopped"
    words = tiny_words("trainer.max_steps=100000", f"run_dir={run}")
    often = ["callback.checkpoint.every_n_steps=50", "trainer.val_check_interval=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "routerlab.cli.main", "train", *words, *often],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.time() + 120
    while not list(run.glob("checkpoints/step_*.ckpt")):
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert json.loads((run / "status.json").read_text())["state"] == state
    assert (run / "report.html").is_file()
    if sent == signal.SIGINT:
        assert f"go on with: routerlab train resume={run}" in said
        return
    steps = [row["step"] for row in csv.DictReader((run / "metrics.csv").open())]
    newest = max(run.glob("checkpoints/step_*.ckpt"))
    assert int(newest.stem.removeprefix("step_")) == int(steps[-1])  # saved where it stopped
