"""The command line of sweeps, and what it foretells."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from routerlab.cli import train as cli
from routerlab.cli.main import main
from routerlab.core.config import compose
from routerlab.sweeps.estimate import estimate
from routerlab.sweeps.jobs import Job

HEAVY = ("torch", "lightning", "transformers", "datasets", "wandb")


@pytest.mark.parametrize(
    ("words", "sweep"),
    [
        (["router=hash"], False),
        (["router=hash", "-m"], True),
        (["--multirun", "router=a,b"], True),
        (["sweep=routers"], True),
        (["launcher=slurm", "router=hash"], True),
        (["--trials", "3", "optimizer.optimizer.lr=interval(0,1)"], True),
        (["--search=tpe"], True),
        (["router=hash", "--dry-run"], True),
        (["hydra.mode=MULTIRUN", "router=a,b"], True),
        (["launcher=local"], False),
        (["launcher=slurm", "--cfg", "job"], False),
        (["launcher=slurm", "hydra.mode=RUN"], False),  # a job of such a sweep
        (["--help"], False),
        (["-m", "--help"], True),
    ],
)
def test_which_words_make_a_sweep(words: list[str], sweep: bool) -> None:
    assert cli._is_sweep(words) is sweep


def test_the_help_of_a_sweep_names_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "-m", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--trials", "--search", "--metric", "--dry-run", "glob(*)", "launcher=slurm"):
        assert flag in said


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--dryrun"], "unrecognized arguments: --dryrun"),
        (["--trials", "many"], "--trials: invalid int value: 'many'"),
        (["--search", "bayes"], "invalid choice: 'bayes'"),
        (["--cfg", "job"], "unrecognized arguments: --cfg"),
    ],
)
def test_wrong_flags_are_refused_with_the_usage(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", *words]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert "usage: routerlab train -m" in said


def test_wrong_words_are_refused_before_anything_is_started(
    tiny_words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_words("router=hash,switsh", f"paths.output_dir={tmp_path / 'out'}")
    assert main(["train", "-m", *words]) == 2
    assert "router=switsh: no such config; did you mean 'switch'" in capsys.readouterr().err
    words = tiny_words("launcher.workers=0", f"paths.output_dir={tmp_path / 'out'}")
    assert main(["train", "-m", *words]) == 2
    assert "launcher.workers=0: must be a whole number, at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def sweep_words(words: Callable[..., list[str]], output: Path, *more: str) -> list[str]:
    return words(f"paths.output_dir={output}", "router=token_choice,hash", "seed=0,1", *more)


def test_a_dry_run_shows_the_jobs_and_what_they_cost_and_writes_nothing(
    tiny_words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = sweep_words(tiny_words, tmp_path / "out", "group=g", "launcher.workers=2")
    assert main(["train", "-m", "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert (
        len(re.findall(r"^router=\w+ seed=[01] +new +router-\w+_seed-[01]_\w{10}$", said, re.M))
        == 4
    )
    assert f"in {tmp_path}/out/sweeps/g\n4 jobs: 4 new\n" in said
    assert "training on 4,096 tokens" in said  # 4 jobs, 4 steps of 8 windows of 32 tokens
    found = re.search(r"4 jobs of about [\d.]+ s, 2 at a time \(from a few training steps", said)
    assert found is not None
    assert not (tmp_path / "out").exists()


def test_no_torch_is_imported_to_start_a_sweep() -> None:
    code = (
        "import sys; import routerlab.sweeps.command, routerlab.sweeps.slurm\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def jobs(words: list[str], folder: Path) -> list[Job]:
    return [Job(str(n), folder / str(n), (*words, f"seed={n}")) for n in range(3)]


def put_finished(path: Path, words: list[str], seconds: int) -> None:
    """A finished run of these words that took so long."""
    from omegaconf import OmegaConf

    path.mkdir(parents=True)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(compose(*words), resolve=True))
    (path / "summary.json").write_text('{"train_seconds": 1.0}')
    (path / "environment.json").write_text("{}")
    os.utime(path / "environment.json", (1_000_000_000, 1_000_000_000))
    (path / "status.json").write_text(
        f'{{"state": "done", "at": "2001-09-09T01:{46 + seconds // 60}:40+00:00"}}'
    )


def test_times_are_those_of_runs_alike(
    tiny_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = tiny_words()
    for name, seconds in (("a", 60), ("b", 120), ("c", 600)):
        put_finished(tmp_path / name, [*words, "seed=7", "router=hash"], seconds)
    put_finished(tmp_path / "other", [*words, "backbone.d_model=64"], 6)
    found = estimate(jobs(words, tmp_path), tmp_path, threads=None)
    assert found.seconds == 3 * 120  # the median; a seed and a router make it no other run
    assert found.tokens == 3 * 4 * 8 * 32
    assert found.source == "finished runs of this sweep"


def test_times_elsewhere_are_not_known_without_a_finished_run(
    tiny_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    put_finished(tmp_path / "other", tiny_words("trainer.max_steps=9"), 60)
    found = estimate(jobs(tiny_words(), tmp_path), tmp_path, threads=None)
    assert found.seconds is None
    assert found.source == "no finished run of this sweep is like these"


def test_eval_still_takes_several_runs(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "-m", f"run='{finished_run}'", "max_val_windows=8,16"]) == 0
    assert capsys.readouterr().out.count("step_000004.ckpt") == 2
