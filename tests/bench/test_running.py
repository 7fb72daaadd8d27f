"""`routerlab bench running`: real saves, runs that look real, the file."""

import csv
import json
from pathlib import Path

import pytest
import torch

from routerlab.bench import running, saving
from routerlab.bench.command import main
from routerlab.bench.generated_runs import generate
from routerlab.bench.layer import Settings
from routerlab.bench.running import RunningRow, running_table
from routerlab.comparison.runs import load_runs
from routerlab.core.config import compose
from tests.conftest import TINY


def test_generated_runs_are_read_as_runs(finished_run: Path, tmp_path: Path) -> None:
    generate(finished_run, tmp_path / "runs", 5, 250, ("hash", "switch"), seed=0)
    runs, warnings = load_runs([tmp_path / "runs"])
    assert warnings == []
    assert [(run.choices["router"], run.seed, run.state) for run in runs] == [
        ("hash", 0, "done"), ("switch", 0, "done"), ("hash", 1, "done"), ("switch", 1, "done"),
        ("hash", 2, "done"),
    ]  # fmt: skip
    assert runs[0].config["router._target_"] != runs[1].config["router._target_"]
    assert len({run.value("val/bits_per_byte") for run in runs}) == 5
    frame = runs[0].metrics()
    with (finished_run / "metrics.csv").open(newline="") as file:
        assert set(frame) == set(next(csv.reader(file)))  # all that a run logs
    assert frame["train/loss"].notna().sum() == 250
    assert frame["val/loss"].notna().sum() == 125  # in rows of their own
    assert frame["step"].is_monotonic_increasing


def test_saves_are_timed_in_a_real_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [word for word in TINY if word.startswith("backbone.")]
    monkeypatch.setattr(saving, "compose", lambda *words: compose(*words, *small))
    found = saving.measure_saving(Settings(1e-3, torch.device("cpu")), tmp_path)
    assert len(found.saves) == 3  # of five: two are not counted
    assert all(0 < seconds < 10 for seconds in found.saves)
    assert 0 < found.step < 10
    newest = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    assert [path.name for path in newest] == ["step_000020.ckpt", "step_000025.ckpt"]
    assert found.mebibytes == newest[-1].stat().st_size / 2**20


def test_the_table_says_whether_the_goal_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    rows = [
        RunningRow.of("sweep", [0.3, 0.2, 2.0], "s a job", "three of them", 1.0),
        RunningRow.of("compare", [11.0, 12.0, 10.0], "s", "200 runs", 10.0),
    ]
    Console().print(running_table(rows))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["sweep", "0.30", "0.20", "to", "2.00", "s", "a", "job", "1", "yes"] in lines
    assert ["compare", "11.0", "10.0", "to", "12.0", "s", "10", "no"] in lines
    assert ["sweep:", "three", "of", "them"] in lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--jobs", "0"], "--jobs=0: must be at least 1"),
        (["--runs", "0"], "--runs=0: must be at least 1"),
        (["--folder", "/nowhere"], "--folder=/nowhere: no such folder"),
        (["--seconds", "0"], "--seconds=0.0: must be above 0"),
    ],
)
def test_bad_input(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["running", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="routerlab train failed:\n(.|\n)*no such config"):
        running.routerlab("train", "router=nothing")


@pytest.mark.slow
def test_a_run_writes_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_ROUNDS", 1)
    file = tmp_path / "bench.json"
    words = ["--jobs", "1", "--runs", "4", "--steps", "50", "--seconds", "0.1", "--threads", "1"]
    assert main(["running", *words, "--folder", str(tmp_path), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    names = [row["name"] for row in found["rows"]]
    assert names == ["checkpoints", "sweep", "compare", "compare, with page"]
    assert all(row["goal"] > 0 for row in found["rows"])
    assert found["numbers"] == {"jobs": 1, "runs": 4, "steps": 50}
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]  # the runs are gone
