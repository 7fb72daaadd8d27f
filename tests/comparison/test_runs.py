"""Run directories are found and read, whatever state they are in."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import routerlab as rl
from routerlab.comparison.runs import BrokenRunError, find_runs, load_run, load_runs
from routerlab.core.config import ConfigError
from routerlab.reports.run_files import curve
from routerlab.training.run_directory import RunDirectory
from tests.helpers import runs as helper


def test_a_generated_run_has_the_files_of_a_real_one(finished_run: Path, tmp_path: Path) -> None:
    made = helper.finished_run(tmp_path / "made", ["seed=1"])
    for name in ("status.json", "environment.json"):
        real = json.loads((finished_run / name).read_text())
        assert json.loads((made / name).read_text()).keys() <= real.keys(), name
    summary = json.loads((made / "summary.json").read_text())
    real = json.loads((finished_run / "summary.json").read_text())
    assert summary.keys() <= real.keys()
    assert summary["val"].keys() <= real["val"].keys()
    assert summary["parameters"].keys() == real["parameters"].keys()
    one, other = load_run(made), load_run(finished_run)
    assert set(one.config) >= {"seed", "data.seed", "router.top_k", "trainer.max_steps"}
    assert one.choices.keys() == other.choices.keys()
    assert {"train/loss", "val/loss", "val/bits_per_byte"} <= {*one.logged()} & {*other.logged()}
    header = (made / "metrics.csv").read_text().splitlines()[0]
    assert header.startswith("step,")
    assert (finished_run / "metrics.csv").read_text().startswith("step,")


def test_a_real_run_says_what_its_files_say(finished_run: Path) -> None:
    run = load_run(finished_run)
    summary = json.loads((finished_run / "summary.json").read_text())
    assert (run.name, run.state, run.seed) == (finished_run.name, "done", 0)
    assert run.choices["router"] == "token_choice"
    assert run.config["backbone.num_experts"] == 4
    assert run.value("val/bits_per_byte") == summary["val"]["bits_per_byte"]
    losses = curve(run.metrics("train/loss", "no/such/key"), "train/loss")
    assert losses.steps.tolist() == [1, 2, 3, 4]
    assert run.value("train/loss") == losses.values[-1]
    assert set(run.metrics()) == {"step", *run.logged()}


def test_runs_inside_runs_are_not_compared(tmp_path: Path) -> None:
    helper.finished_run(tmp_path / "sweep" / "a")
    helper.finished_run(tmp_path / "sweep" / "a" / "baselines" / "lora")
    helper.finished_run(tmp_path / "sweep" / "a" / "pretrain")
    helper.finished_run(tmp_path / "sweep" / "deep" / "er" / "b")
    helper.finished_run(tmp_path / "sweep" / ".hidden" / "c")
    assert [path.name for path in find_runs([tmp_path])] == ["a", "b"]
    inside = tmp_path / "sweep" / "a" / "baselines"
    assert [path.name for path in find_runs([inside])] == ["lora"]  # asked for
    twice = find_runs([tmp_path / "sweep" / "a", tmp_path, f"{tmp_path}/sweep/../sweep/a"])
    assert [path.name for path in twice] == ["a", "b"]


def test_a_path_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        find_runs([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="'.*empty' holds no runs"):
        find_runs([tmp_path / "empty"])


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    for place in ("hash/seed_0", "switch/seed_0", "switch/other"):
        helper.finished_run(tmp_path / place)
    runs, _ = load_runs([tmp_path])
    assert [run.name for run in runs] == ["hash/seed_0", "other", "switch/seed_0"]


def _no_config(path: Path) -> None:
    (path / "config.yaml").unlink()


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(text) and None


def _bytes(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(b"\xff\xfe\x00{") and None


def _no_seed(path: Path) -> None:
    config = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump({**config, "seed": None}))


def _folder(path: Path) -> None:
    (path / "config.yaml").unlink()
    (path / "config.yaml").mkdir()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_no_config, "it has no config.yaml"),
        (_text("config.yaml", ""), "config.yaml holds no config"),
        (_text("config.yaml", "seed: 0\nrouter: {top_k: 2"), "config.yaml is not valid YAML"),
        (_text("config.yaml", "- a\n- b\n"), "config.yaml holds no config"),
        (_bytes("config.yaml"), "config.yaml cannot be read"),
        (_no_seed, "config.yaml gives no seed"),
        (_folder, "it has no config.yaml|config.yaml cannot be read"),
        (_text("status.json", '{"state": "do'), "status.json is not valid JSON"),
        (_text("status.json", "[]"), "status.json holds no JSON object"),
        (_text("summary.json", ""), "summary.json is not valid JSON"),
        (_text("summary.json", '{"val": {"bits_per_byte": 2.5'), "summary.json is not valid JSON"),
        (_bytes("summary.json"), "summary.json cannot be read"),
        (_text("environment.json", "{,}"), "environment.json is not valid JSON"),
        (_text("choices.yaml", "router: ["), "choices.yaml is not valid YAML"),
        (_text("choices.yaml", "hash"), "choices.yaml holds no choices"),
    ],
)
def test_a_broken_run_is_named_and_skipped(
    spoil: Callable[[Path], None], why: str, tmp_path: Path
) -> None:
    helper.finished_run(tmp_path / "good")
    spoil(helper.finished_run(tmp_path / "broken"))
    runs, warnings = load_runs([tmp_path])
    assert [run.name for run in runs] == ["good"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{tmp_path / 'broken'} is skipped: ")
    with pytest.raises(BrokenRunError, match=why):
        load_run(tmp_path / "broken")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_of_someone_else_is_named(tmp_path: Path) -> None:
    run = helper.finished_run(tmp_path / "run")
    (run / "config.yaml").chmod(0)
    with pytest.raises(BrokenRunError, match="Permission denied"):
        load_run(run)


def test_states(tmp_path: Path) -> None:
    dead = helper.finished_run(tmp_path / "dead", state="running", bits=None)
    assert load_run(dead).state == "cut"  # no process trains it
    with RunDirectory(dead).held():
        assert load_run(dead).state == "running"
    assert load_run(dead).state == "cut"
    failed = helper.finished_run(tmp_path / "failed", state="failed", bits=None)
    assert load_run(failed).state == "failed"
    (failed / "status.json").unlink()  # killed between its config and its first status
    assert load_run(failed).state == "cut"


def test_older_runs_without_choices(tmp_path: Path) -> None:
    by_words = helper.finished_run(tmp_path / "a", ["router=switch", "seed=0"])
    by_module = helper.finished_run(tmp_path / "b", ["seed=0"])
    for path in (by_words, by_module):
        (path / "choices.yaml").unlink()
    (by_module / "overrides.yaml").unlink()
    assert load_run(by_words).choices == {"router": "switch"}
    assert load_run(by_module).choices == {"router": "token_choice"}


def test_after_a_resume_the_last_row_counts_and_torn_lines_do_not(tmp_path: Path) -> None:
    run = helper.finished_run(tmp_path / "run", bits=None)
    (run / "metrics.csv").write_text(
        "step,train/loss,val/loss\n1,5.0,\n2,4.0,\n3,3.0,9.0\n2,4.5,\n3,3.5,\n4,2.0,nan\n5,1.2"
    )
    found = load_run(run)
    assert found.value("train/loss") == 2.0  # 1.2 may be a part of 1.25
    assert found.value("val/loss") == 9.0  # nan is no value
    assert curve(found.metrics("train/loss"), "train/loss").values.tolist() == [5, 4.5, 3.5, 2]
    assert found.value("val/accuracy") is None


def test_the_final_evaluation_comes_before_the_curve(tmp_path: Path) -> None:
    val = {"accuracy": 0.5, "by_task": {"quartz": {"accuracy": 0.25}}, "loss": float("nan"),
           "bits_per_byte": 2.0, "bits_per_byte_by_domain": {"code": 1.5}}  # fmt: skip
    curve = ["val/loss", "val/accuracy/quartz", "val/bits_per_byte/code", "val/bits_per_byte/prose"]
    rows = [{"step": 2, **dict.fromkeys(curve, 9.0)}]
    run = load_run(helper.finished_run(tmp_path / "run", summary={"val": val}, rows=rows))
    expected = {
        "val/accuracy": 0.5,
        "val/accuracy/quartz": 0.25,
        "val/bits_per_byte": 2.0,
        "val/bits_per_byte/code": 1.5,
        "val/bits_per_byte/prose": 9.0,  # the summary does not have it
        "val/loss": None,  # it diverged; what it was before is not its value
        "val/by_task": None,
    }
    assert {metric: run.value(metric) for metric in expected} == expected


@pytest.mark.parametrize("text", ["", "ste", "step,train/loss\n", "\x00\x00", "loss\n1.0\n"])
def test_a_metrics_file_without_rows(text: str, tmp_path: Path) -> None:
    run = helper.finished_run(tmp_path / "run", bits=None)
    (run / "metrics.csv").write_text(text)
    found = load_run(run)
    assert found.value("train/loss") is None
    assert found.metrics().empty
    (run / "metrics.csv").unlink()
    assert found.value("train/loss") is None
    assert found.logged() == []


def test_a_damaged_metrics_file_keeps_its_other_rows(tmp_path: Path) -> None:
    run = helper.finished_run(tmp_path / "run", bits=None)
    lines = b"step,a,b\n1,1.0,2.0\n2,garb\xffage,3.0\n3,4.0\n4,5.0,6.0,7.0\n5,8.0,inf\n"
    (run / "metrics.csv").write_bytes(lines)
    metrics = load_run(run).metrics()
    assert metrics["step"].tolist() == [1, 2, 5]  # rows of another length are not whole
    np.testing.assert_array_equal(metrics["a"], [1, np.nan, 8])
    np.testing.assert_array_equal(metrics["b"], [2, 3, np.nan])


def test_what_decides_on_the_numbers(tmp_path: Path) -> None:
    words = ["seed=3", "name=mine", "trace_sequences=7", "data.cache_dir=/elsewhere"]
    source = {"init_from": "/runs/dense/seed_3", "run_dir": "/runs/seed_3"}
    one = load_run(helper.finished_run(tmp_path / "a", words, config=source))
    source = {"init_from": "/runs/dense/seed_14", "run_dir": "/runs/seed_14"}
    other = load_run(helper.finished_run(tmp_path / "b", ["seed=14"], config=source))
    assert one.science == other.science
    assert one.science["init_from"] == "/runs/dense/seed_*"
    assert "router.top_k" in one.science
    assert one.sections["optimizer"] == ["_target_", "warmup_steps", "final_lr_ratio", "optimizer"]


def test_broken_runs_are_left_out_of_the_frame(finished_run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(finished_run, broken, ignore=shutil.ignore_patterns("checkpoints", "wandb"))
    (broken / "summary.json").write_text("{")
    with pytest.warns(UserWarning, match=r"broken is left out: summary.json is not valid JSON"):
        table = rl.compare([finished_run, broken])
    assert list(table.index) == [finished_run.name]
    assert table.loc[finished_run.name, "tokens_per_second"] > 0
    with pytest.raises(ValueError, match="holds no run"):
        rl.compare([tmp_path])
