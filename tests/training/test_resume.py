"""A run that was killed goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from routerlab.core.config import ConfigError, compose
from routerlab.training.train import train as start
from tests.training.test_train import rows

# What a resumed run must repeat: dropped tokens, router noise, a bias that moves every step, a
# schedule, micro-batches, validation.
STATEFUL = (
    "router.jitter_eps=0.1",
    "router.capacity_factor=1.0",
    "balancer=expert_bias",
    "schedule=[linear]",
    "schedule.linear.target=router.capacity_factor",
    "schedule.linear.start=2.0",
    "schedule.linear.end=0.5",
    "objective.micro_batches=2",
    "trainer.max_steps=12",
    "trainer.val_check_interval=4",
    "callback.checkpoint.every_n_steps=2",
)
TIMES = ("train/tokens_per_second",)  # all else is to be equal to the last bit


def numbers(run: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    path = max((run / "checkpoints").glob("step_*.ckpt"))
    state = torch.load(path, weights_only=True)
    moments = state["optimizer_states"][0]["state"]
    flat = {f"{i}/{k}": torch.as_tensor(v) for i, m in moments.items() for k, v in m.items()}
    return state["state_dict"] | flat


@pytest.fixture(scope="module")
def uninterrupted(train: Callable[..., Path]) -> Path:
    return train(*STATEFUL, "name=uninterrupted")


def test_a_killed_run_continues_bitwise(
    uninterrupted: Path, tiny_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    program = [sys.executable, "-m", "routerlab.cli.main", "train"]
    words = [*tiny_words(*STATEFUL), f"run_dir={killed}"]
    process = subprocess.Popen([*program, *words], stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (killed / "checkpoints" / "step_000004.ckpt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert max(int(row["step"]) for row in rows(killed)) < 12
    subprocess.run([*program, f"resume={killed}"], check=True, stdout=subprocess.DEVNULL)
    assert numbers(killed) == numbers(uninterrupted)
    for (name, a), b in zip(weights(killed).items(), weights(uninterrupted).values(), strict=True):
        assert torch.equal(a, b), name


def interrupted(train: Callable[..., Path], at: int, **kwargs: str) -> Path:
    """A run that is cut off in process after ``at`` steps, between a step and its end."""
    import routerlab.training.callbacks.metrics as module

    class Cut(Exception):
        pass

    log = module.Metrics.on_train_batch_start

    def cut(self: module.Metrics, trainer: object, *rest: object) -> None:
        if trainer.global_step == at:  # type: ignore[attr-defined]
            raise Cut
        log(self, trainer, *rest)  # type: ignore[arg-type]

    module.Metrics.on_train_batch_start = cut  # type: ignore[method-assign]
    try:
        with pytest.raises(Cut):
            train(*STATEFUL, *kwargs.values())
    finally:
        module.Metrics.on_train_batch_start = log  # type: ignore[method-assign]
    return Path(kwargs["run_dir"].removeprefix("run_dir="))


def resume(run: Path, *words: str) -> Path:
    overrides = [*words, f"resume={run}"]
    return start(compose(*overrides), overrides).path


def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    train: Callable[..., Path],
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = interrupted(train, at=7, run_dir=f"run_dir={tmp_path / 'cut'}")
    newest = run / "checkpoints" / "step_000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    (run / "checkpoints" / "step_000008.ckpt.tmp").write_bytes(b"half")
    resume(run)
    assert "step_000006.ckpt is truncated; falling back to" in capsys.readouterr().out
    assert numbers(run) == numbers(uninterrupted)
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_a_validation_that_was_cut_off_is_made_up_for(
    train: Callable[..., Path], uninterrupted: Path, tmp_path: Path
) -> None:
    run = interrupted(train, at=9, run_dir=f"run_dir={tmp_path / 'cut'}")
    # as if killed after the checkpoint of step 8 and before the end of its validation
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    column = lines[0].rstrip().split(",").index("val/loss")
    kept = [ln for ln in lines if not (ln.startswith("8,") and ln.split(",")[column])]
    assert len(kept) == len(lines) - 1
    (run / "metrics.csv").write_text("".join(kept))
    resume(run)
    assert numbers(run) == numbers(uninterrupted)


def test_a_run_without_a_checkpoint_starts_again(
    train: Callable[..., Path], uninterrupted: Path, tmp_path: Path
) -> None:
    run = interrupted(train, at=1, run_dir=f"run_dir={tmp_path / 'cut'}")
    resume(run)
    assert numbers(run) == numbers(uninterrupted)


def test_a_finished_run_can_be_resumed_and_does_nothing(
    train: Callable[..., Path],
) -> None:
    run = train("name=twice")
    before = numbers(run)
    resume(run)
    assert numbers(run) == before


def test_another_config_is_refused_and_the_difference_shown(finished_run: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resume(finished_run, "router.score_fn=sigmoid", "seed=7")
    assert "router.score_fn: softmax -> sigmoid" in str(caught.value)
    assert "seed: 0 -> 7" in str(caught.value)
    assert "d_model" not in str(caught.value)


def test_a_checkpoint_of_another_config_is_refused(train: Callable[..., Path]) -> None:
    run = train("name=edited")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("score_fn: softmax", "score_fn: sigmoid"))
    with pytest.raises(ConfigError, match="router.score_fn: softmax -> sigmoid"):
        resume(run)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        resume(tmp_path)


def test_other_text_than_before_is_refused(
    train: Callable[..., Path],
    tiny_words: Callable[..., list[str]],
    text_files: dict[str, Path],
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text(text_files["prose"].read_text())
    words = [word for word in tiny_words("name=text") if not word.startswith("data.domains")]
    run = train(words=[*words, f"data.domains={{mine: {mine}}}"])
    mine.write_text(text_files["code"].read_text())
    with pytest.raises(ConfigError, match="not the text that the run was trained on"):
        resume(run)


def test_a_cache_elsewhere_is_the_same_run(train: Callable[..., Path], tmp_path: Path) -> None:
    run = train("name=moved")
    before = numbers(run)
    resume(run, f"paths.cache_dir={tmp_path}")
    assert numbers(run) == before


def test_a_finished_run_can_be_extended(train: Callable[..., Path]) -> None:
    run = train("name=longer")
    before = numbers(run)
    resume(run, "trainer.max_steps=6")
    after = numbers(run)
    assert after[: len(before)] == before
    assert [row["step"] for row in after[len(before) :]] == ["5", "6", "6"]  # and its validation
