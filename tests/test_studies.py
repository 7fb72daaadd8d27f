"""The studies of experiments/: definitions, runner, table."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiments.studies import command
from experiments.studies.definition import Study, load, names
from experiments.studies.figure import draw
from experiments.studies.results import check_comparable, collect, read_run, write_csv
from experiments.studies.runner import plan, run
from experiments.studies.table import table
from experiments.studies.timing import check, measure

from routerlab.core.config import compose
from routerlab.training.build import build_backbone

ROOT = Path(__file__).parents[1]
STUDIES = ["bip_balance", "dynamoe_schedules", "erc_coupling", "router_zoo", "selective_sinkhorn"]


def study(folder: Path, **changes: Any) -> Study:
    """A study of two arms in ``folder``."""
    values: dict[str, Any] = {
        "question": "Which?",
        "claim": "b",
        "paper": "arXiv 0000.00000",
        "baseline": "a",
        "arms": {"a": [], "b": ["router.top_k=1"]},
        "metrics": ["max_violation"],
        "panels": ["bits_per_byte", "max_violation"],
    }
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(values | changes))
    return load(str(folder))


def finished(path: Path, bits: float, words: list[str] | None = None, **config: Any) -> None:
    """A run directory as a finished run of two layers leaves it."""
    path.mkdir(parents=True)
    layer = {"max_violation": 1.0, "dead_experts": 0.0}
    summary = {
        "steps": 4,
        "tokens": 400,
        "train_seconds": 2.0,
        "looks_ahead": "no",
        "parameters": {"total": 100, "active": 40},
        "val": {"bits_per_byte": bits},
        "layers": [{"layer": "layers.00"} | layer, {"layer": "layers.01", "max_violation": 3.0}],
    }
    summary["layers"][1]["dead_experts"] = 1.0
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "status.json").write_text('{"state": "done"}')
    (path / "overrides.yaml").write_text(yaml.safe_dump(words or []))
    made = {"seed": int(path.name[5:]), "data": {"batch_size": 8, "seed": int(path.name[5:])}}
    (path / "config.yaml").write_text(yaml.safe_dump(made | {"router": {"top_k": 2}} | config))
    (path / "metrics.csv").write_text(
        "step,router/layers.00/max_violation,router/layers.01/max_violation,"
        "router/mean/max_violation,train/tokens_per_second,val/router/mean/load_cv\n"
        "1,4.0,2.0,3.0,50.0,\n"  # 100 tokens a step: 2 s
        "2,1.0,3.0,2.0,100.0,\n"  # 1 s
        "3,1.0,1.0,1.0,400.0,\n"  # 0.25 s
        "4,,,,,0.5\n"
    )


# -- definitions ----------------------------------------------------------------------------------


def test_the_five_studies_are_there() -> None:
    assert set(STUDIES) <= set(names())


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_takes_a_step(name: str, tiny_words: Callable[..., list[str]]) -> None:
    keys = ("data=", "data.domains", "paths.", "trainer.accelerator")
    words = [word for word in tiny_words() if word.startswith(keys)]
    small = ["data.seq_len=32", "data.batch_size=4", "data.max_val_windows=16"]
    assert check(load(name), [*words, *small]) == {}


def active(arms: Study, arm: str) -> int:
    return build_backbone(compose(*arms.words(arm))).count_parameters()["active"]


def test_the_zoo_compares_equal_numbers_of_active_parameters() -> None:
    zoo = load("router_zoo")
    other = {"soft", "base", "top_p", "threshold"}  # dense; one expert; the number is learned
    base = active(zoo, "token_choice")
    for arm in zoo.arms.keys() - other:
        assert active(zoo, arm) == pytest.approx(base, rel=0.03), arm


def test_schedules_have_equal_experts_and_equal_active_parameters() -> None:
    arms = load("dynamoe_schedules")
    found = {}
    for arm in arms.arms:
        layers = build_backbone(compose(*arms.words(arm))).moe_layers.values()  # pyright: ignore
        found[arm] = [(m.experts.num_experts, m.router.top_k) for m in layers]
    assert {sum(e for e, _ in layers) for layers in found.values()} == {64}
    assert {sum(k for _, k in layers) for layers in found.values()} == {16}
    assert found["descending"] == [(24, 6), (19, 5), (13, 3), (8, 2)]
    assert len(set(map(tuple, found.values()))) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "c"}, "baseline 'c' is no arm"),
        ({"labels": {"c": "C"}}, r"labels of \['c'\]"),
        ({"arms": {"a": [], "b/c": []}}, "'b/c' cannot be the name of a folder"),
        ({"arms": {"a": [{"x": 1}]}}, "overrides are words"),
        ({"colour": "red"}, r"unknown keys \['colour'\]"),
    ],
)
def test_a_wrong_definition_is_refused(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        study(tmp_path / "s", **changes)


def test_an_unknown_study_is_told_which_there_are(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["run", "router_zo"]) == 2
    assert "router_zoo" in capsys.readouterr().err


# -- runner ---------------------------------------------------------------------------------------


def test_all_arms_of_a_seed_come_before_the_next_seed(tmp_path: Path) -> None:
    jobs = plan(study(tmp_path / "s"), [3, 1], tmp_path / "out")
    assert [job.title for job in jobs] == ["a seed 3", "b seed 3", "a seed 1", "b seed 1"]
    assert jobs[3].path == tmp_path / "out/s/b/seed_1"
    assert jobs[3].words == ("experiment=study", "router.top_k=1", "seed=1", "logger=[]")
    assert jobs[3].command()[-5:] == [*jobs[3].words, f"run_dir='{jobs[3].path}'"]


def test_finished_runs_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms, out = study(tmp_path / "s"), tmp_path / "out"
    jobs = plan(arms, [0], out)
    for job in jobs:
        finished(job.path, 2.5, [*job.words, f"run_dir='{job.path}'"])
    assert run(arms, jobs, out, 1) == 0
    assert not any(job.log.exists() for job in jobs)
    said = capsys.readouterr().out
    assert "2 of 2 runs are done already, 0 to go" in said
    assert "next: python experiments/study.py report s" in said


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    job = plan(study(tmp_path / "s"), [0], tmp_path / "out")[0]
    assert job.state() == "new"
    finished(job.path, 2.5, list(job.words))
    assert job.state() == "done"
    for state in ("running", "failed", "preempted"):
        (job.path / "status.json").write_text(json.dumps({"state": state}))
        assert job.state() == ("failed" if state == "failed" else "cut")
        assert job.command()[3] == "train"
        assert job.command()[-1] == f"resume='{job.path}'"


def test_a_run_of_other_overrides_is_not_taken_for_this_one(tmp_path: Path) -> None:
    arms, out = study(tmp_path / "s"), tmp_path / "out"
    job = plan(arms, [0], out)[1]
    finished(job.path, 2.5, [word.replace("top_k=1", "top_k=2") for word in job.words])
    with pytest.raises(ValueError, match="holds a run of other overrides"):
        run(arms, [job], out, 1)


# -- report ---------------------------------------------------------------------------------------


def test_the_numbers_of_a_run_by_hand(tmp_path: Path) -> None:
    finished(tmp_path / "seed_0", 2.5)
    row = read_run(tmp_path / "seed_0")
    assert row["bits_per_byte"] == 2.5
    assert row["max_violation"] == 2.0  # mean of 1 and 3
    assert row["dead_experts"] == 0.5
    assert row["load_cv"] == 0.5  # only in metrics.csv
    assert row["avg_max_violation"] == 2.0  # (4 + 1 + 1) / 3 and (2 + 3 + 1) / 3
    assert row["sup_max_violation"] == 3.5  # 4 and 3
    assert row["step_seconds"] == 1.0  # median of 2, 1 and 0.25
    assert row["active_parameters"] == 40


def test_the_table_has_means_intervals_and_paired_differences(tmp_path: Path) -> None:
    arms, out = study(tmp_path / "s", labels={"b": "bee"}), tmp_path / "out"
    for seed, (one, other) in enumerate([(2.0, 1.9), (3.0, 2.9), (4.0, 3.87)]):
        finished(arms.run_path(out, "a", seed), one)
        finished(arms.run_path(out, "b", seed), other)
    rows = collect(arms, None, out)
    page = table(arms, rows, {"a": 1.0, "b": 1.234})
    assert "| a (baseline) | 3 | 3.000 ± 2.484 | - | - | 2.000 ± 0.000 | 1.00 x | no |" in page
    assert "| bee | 3 | 2.890 ± 2.447 | -0.110 ± 0.043 | yes | 2.000 ± 0.000 | 1.23 x |" in page
    assert "Of 1 such intervals 0.1 would do so by chance" in page
    write_csv(tmp_path / "results.csv", rows)
    read = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(r["arm"], r["seed"], r["bits_per_byte"]) for r in read[2:4]] == [
        ("a", "2", "4"),
        ("b", "0", "1.9"),
    ]


def test_failed_and_missing_runs_are_told(tmp_path: Path) -> None:
    arms, out = study(tmp_path / "s"), tmp_path / "out"
    finished(arms.run_path(out, "a", 0), 2.0)
    finished(arms.run_path(out, "a", 1), 2.0)
    failed = arms.run_path(out, "b", 0)
    failed.mkdir(parents=True)
    (failed / "status.json").write_text('{"state": "failed", "error": "NonFinite: nan\\nmore"}')
    printed = failed.with_name("seed_1") / "job.log"
    printed.parent.mkdir()
    printed.write_text("hello\nerror: router.top_k=99\nbye\n")
    rows = collect(arms, [0, 1, 2], out)
    page = table(arms, rows, {})
    assert "| b | 0 | - | - | - | - | - |" in page
    assert "- b seed 0: failed NonFinite: nan\n" in page
    assert "- b seed 1: failed error: router.top_k=99\n" in page
    assert "- b seed 2: missing" in page


def test_runs_that_differ_in_more_than_the_seed_are_not_compared(tmp_path: Path) -> None:
    arms, out = study(tmp_path / "s"), tmp_path / "out"
    paths = {(arm, seed): arms.run_path(out, arm, seed) for arm in "ab" for seed in (0, 1)}
    finished(paths["a", 0], 2.0)
    finished(paths["a", 1], 2.0)
    finished(paths["b", 0], 2.0, router={"top_k": 1})
    runs = [(arm, path) for (arm, _), path in paths.items()]
    check_comparable(arms, runs)
    finished(paths["b", 1], 2.0, router={"top_k": 3})
    with pytest.raises(ValueError, match=r"b/seed_1 cannot be compared .* router.top_k"):
        check_comparable(arms, runs)


def test_arms_must_share_their_data_unless_they_say_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for said in (False, True):
        words = ["data.batch_size=4"] if said else []
        arms = study(tmp_path / f"s{said}", arms={"a": [], "b": words})
        finished(arms.run_path(out, "a", 0), 2.0)
        finished(arms.run_path(out, "b", 0), 2.0, data={"batch_size": 4})
        if said:
            assert len(collect(arms, None, out)) == 2
        else:
            with pytest.raises(ValueError, match="it differs in data.batch_size"):
                collect(arms, None, out)


@pytest.mark.parametrize("curve", [None, "router/mean/max_violation"])
def test_the_figure_has_a_panel_for_each_question(tmp_path: Path, curve: str | None) -> None:
    from PIL import Image

    pytest.importorskip("matplotlib")
    arms, out = study(tmp_path / "s", curve=curve), tmp_path / "out"
    for seed in (0, 1):
        finished(arms.run_path(out, "a", seed), 2.0 + seed)
    draw(arms, collect(arms, None, out), out, tmp_path / "figure.png")
    width, height = Image.open(tmp_path / "figure.png").size
    assert width == pytest.approx(160 * (1.6 + 3.6 * 2 + (0 if curve is None else 5)), abs=2)
    assert height >= 400


def test_a_curve_that_no_run_logged_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arms, out = study(tmp_path / "s", curve="train/colour"), tmp_path / "out"
    finished(arms.run_path(out, "a", 0), 2.0)
    with pytest.raises(ValueError, match="no run logged 'train/colour'"):
        draw(arms, collect(arms, None, out), out, tmp_path / "figure.png")


# -- real runs ------------------------------------------------------------------------------------


def test_steps_are_timed_in_turns(
    tmp_path: Path,
    tiny_words: Callable[..., list[str]],
) -> None:
    arms = {"a": [], "b": ["router=soft", "loss=[]", "backbone.num_experts=32"]}
    timed = study(tmp_path / "s", common=tiny_words(), arms=arms)
    found, lines = measure(timed, tmp_path / "out", 0.2)
    assert [line[0] for line in lines] == ["arm", "a", "b"]
    assert lines[2][-1] == "fresh"
    assert found["b"].median > 1  # 32 experts a token against 2


def study_run(folder: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, ROOT / "experiments/study.py", *words, folder, "--output", out]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=280)


@pytest.mark.slow
def test_a_study_from_run_to_report(
    tmp_path: Path,
    tiny_words: Callable[..., list[str]],
) -> None:
    folder, out = tmp_path / "s", tmp_path / "out"
    words = [w for w in tiny_words() if not w.startswith(("logger", "trace_sequences"))]
    arms = {"a": [], "b": ["router=top_p", "loss=[]"], "c": ["router.top_k=99"]}
    made = study(folder, common=[*words, "trace_sequences=0"], arms=arms)

    ran = study_run(folder, out, "run", "--seeds", "0")
    assert ran.returncode == 1  # c cannot be built
    assert "3 to go" in ran.stdout
    assert re.search(r"\] a seed 0: \d\.\d{3} bits per byte", ran.stdout)
    assert re.search(r"\] c seed 0: FAILED, .*top_k", ran.stdout)

    interrupted = made.run_path(out, "a", 0)
    before = (interrupted / "metrics.csv").read_text()
    (interrupted / "status.json").write_text('{"state": "running"}')
    again = study_run(folder, out, "run", "--seeds", "0")
    assert "1 of 3 runs are done already, 2 to go" in again.stdout
    assert (interrupted / "metrics.csv").read_text() == before  # went on from its last step

    told = study_run(folder, out, "report")
    assert told.returncode == 1  # c has no result
    page = (folder / "table.md").read_text()
    assert "- c seed 0: failed" in page
    assert (folder / "figure.png").stat().st_size > 10_000
    rows = {row["arm"]: row for row in csv.DictReader((folder / "results.csv").open())}
    assert rows["a"]["state"] == rows["b"]["state"] == "done"
    total, active_parameters = (int(rows["b"][k + "_parameters"]) for k in ("total", "active"))
    # d_model 32, d_ff 32: an expert has 3 * 32 * 32 parameters; 2 layers, 4 experts
    idle = 2 * 3 * 32 * 32 * (4 - float(rows["b"]["experts_per_token"]))
    assert active_parameters == pytest.approx(total - idle, abs=2)


@pytest.mark.slow
def test_a_stopped_study_stops_its_runs(
    tmp_path: Path,
    tiny_words: Callable[..., list[str]],
) -> None:
    folder, out = tmp_path / "s", tmp_path / "out"
    words = [w for w in tiny_words() if not w.startswith(("logger", "trainer.max_steps"))]
    made = study(folder, common=[*words, "trainer.max_steps=100000"])
    line = [sys.executable, ROOT / "experiments/study.py", "run", folder, "--output", out]
    running = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    status = made.run_path(out, "a", 0) / "status.json"
    deadline = time.monotonic() + 120
    while not (status.parent / "metrics.csv").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "the same command goes on" in said
    assert json.loads(status.read_text())["state"] == "preempted"
