"""A run that a signal asks to stop saves between two steps, and goes on as if nothing had been."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from routerlab.training.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from routerlab.training.callbacks.metrics import Metrics
from routerlab.training.preemption import Preempted
from tests.training.test_resume import STATEFUL, numbers, resume, weights
from tests.training.test_train import rows

# Saved by nothing but the signal and the end; slow enough to be caught in the middle.
LONG = (
    *STATEFUL,
    "trainer.max_steps=24",
    "trainer.val_check_interval=12",
    "callback.checkpoint.every_n_steps=1000",
)
PROGRAM = [sys.executable, "-m", "routerlab.cli.main", "train"]


def state(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


def newest_step(run: Path) -> int:
    return max(int(path.stem.removeprefix("step_")) for path in run.glob("checkpoints/step_*.ckpt"))


def test_a_signal_saves_the_step_and_the_run_goes_on_exactly(
    train: Callable[..., Path], tiny_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    whole, run = train(*LONG, "name=uninterrupted"), tmp_path / "run"
    words = [*tiny_words(*LONG, logger="logger=[wandb]"), f"run_dir={run}"]
    process = subprocess.Popen([*PROGRAM, *words], stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (run / "metrics.csv").is_file() or len(rows(run)) < 3:
        assert process.poll() is None, "the run ended before the signal"
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1" in said
    assert f"go on with: routerlab train resume={run}" in said
    assert state(run) == "preempted"
    stopped = rows(run)[-1]
    assert newest_step(run) == int(stopped["step"]) < 24
    assert not stopped.get("val/loss")  # it was not validated for being stopped
    resume(run)
    assert state(run) == "done"
    assert numbers(run) == numbers(whole)
    for (name, a), b in zip(weights(run).items(), weights(whole).values(), strict=True):
        assert torch.equal(a, b), name
    segments = {path.name.rsplit("-", 1)[-1] for path in (run / "wandb").glob("offline-run-*")}
    assert len(segments) == 1  # one W&B run, in as many pieces as there were attempts
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2


def test_a_signal_before_training_waits_for_the_first_step(
    tiny_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    run, nobody = tmp_path / "run", tmp_path / "slurm.conf"
    nobody.write_text("")
    process = subprocess.Popen(
        [*PROGRAM, *tiny_words(*LONG), f"run_dir={run}"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"SLURM_JOB_ID": "7", "SLURM_CONF": str(nobody)},
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]),
    )
    process.send_signal(signal.SIGUSR2)  # as on a node that is given away at once
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGUSR2
    assert newest_step(run) == 1
    assert "SLURM did not queue job 7 again: " in said  # there is none
    assert len(said.split("did not queue job 7 again: ")[1]) > 10  # its own words
    assert state(run) == "preempted"


def at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends this process a signal when that step begins, the first time."""
    begin = Metrics.on_train_batch_start
    steps = [step]

    def signalled(self: Metrics, trainer: object, *rest: object) -> None:
        if steps and trainer.global_step == steps[0]:  # type: ignore[attr-defined]
            steps.clear()
            os.kill(os.getpid(), signal.SIGUSR1)
        begin(self, trainer, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Metrics, "on_train_batch_start", signalled)


def test_a_run_beside_the_run_stops_both(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    run, beside = tmp_path / "run", tmp_path / "run" / "baselines" / "other"
    at_step(monkeypatch, 2)
    with pytest.raises(Preempted) as caught:
        train("+baselines.other=['router=random','loss=[]']", f"run_dir={run}")
    assert caught.value.code == 128 + signal.SIGUSR1
    assert state(run) == state(beside) == "preempted"
    assert newest_step(beside) == 3
    assert signal.getsignal(signal.SIGUSR1) == before
    resume(run)
    assert state(run) == state(beside) == "done"
    assert [row["step"] for row in rows(beside)] == ["1", "2", "2", "3", "4", "4"]


def test_a_signal_in_the_last_validation_stops_a_run_once(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, run = train("name=whole"), tmp_path / "run"
    end = Checkpoint.on_train_end

    def signalled(self: Checkpoint, *rest: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        end(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "on_train_end", signalled)
    with pytest.raises(Preempted):
        train(f"run_dir={run}")
    assert state(run) == "preempted"
    assert newest_step(run) == 4
    assert not (run / "summary.json").exists()
    resume(run)  # again a signal; stopping here would lead to this place for ever
    assert state(run) == "done"
    assert numbers(run) == numbers(whole)


def test_a_signal_in_a_validation_goes_back_to_the_checkpoint(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("callback.checkpoint.every_n_steps=3", "trainer.max_steps=8")
    whole, run = train("name=whole", *words), tmp_path / "run"
    log = Metrics.on_validation_end
    steps = [2, 4]  # before the first checkpoint, after it

    def signalled(self: Metrics, trainer: object, module: object) -> None:
        log(self, trainer, module)  # type: ignore[arg-type]

    def begin(self: Metrics, trainer: object, module: object) -> None:
        if steps and trainer.global_step == steps[0]:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Metrics, "on_validation_start", begin)
    with pytest.raises(Preempted):
        train(f"run_dir={run}", *words)
    assert newest_step(run) == 3  # at step 2 nothing was saved yet: it went on to the next step
    assert rows(run)[-1]["step"] == "3"
    del steps[0]
    with pytest.raises(Preempted):
        resume(run)
    assert newest_step(run) == 5  # step 3 was not of this attempt
    steps.clear()
    resume(run)
    assert numbers(run) == numbers(whole)


def test_half_a_checkpoint_does_not_stay_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.ckpt"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []
