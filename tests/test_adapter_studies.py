"""Studies of adapters: accuracy as the headline, arms that build on the runs of others."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiments.studies.definition import Study, load
from experiments.studies.results import collect, read_run
from experiments.studies.runner import plan, run
from experiments.studies.table import table
from experiments.studies.timing import check

from tests.helpers.language_models import save_tiny


def study(folder: Path, **changes: Any) -> Study:
    """An arm that stands alone, one that others build on, and one that builds on it."""
    values: dict[str, Any] = {
        "question": "Which?",
        "claim": "after",
        "paper": "arXiv 0000.00000",
        "baseline": "alone",
        "experiment": "adapter_study",
        "headline": "accuracy",
        "arms": {"after": ["x={run:before}/adapter"], "alone": [], "before": []},
    }
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(values | changes))
    return load(str(folder))


def finished(path: Path, accuracy: float, **config: Any) -> None:
    """A run directory as a fine-tuning run leaves it, without routers."""
    path.mkdir(parents=True)
    by_task = {name: {"accuracy": accuracy} for name in ("a", "b")}
    summary = {
        "steps": 4, "tokens": 40, "train_seconds": 2.0, "looks_ahead": "no", "layers": [],
        "parameters": {"total": 100, "active": 100, "trainable": 7},
        "val": {"accuracy": accuracy, "loss": 0.5, "by_task": by_task}, "base": {"accuracy": 0.1},
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "status.json").write_text('{"state": "done"}')
    (path / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "data": config}))
    (path / "metrics.csv").write_text(
        "step,router/layers.00/probs_ess_min,router/layers.01/probs_ess_min,"
        "router/mean/probs_ess_min\n1,3.0,2.5,2.75\n2,1.5,2.0,1.75\n"
    )


def test_every_arm_of_remix_vs_mixtures_takes_a_step(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    lines = [json.dumps({"prompt": f"{n} + 1 =", "answer": str(n + 1)}) for n in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    words = [
        f"backbone.path={tmp_path / 'base'}", "adapter.layers_to_transform=[1]", "data=jsonl",
        f"data.tasks={{sums: {tmp_path / 'sums.jsonl'}}}", "data.val_items=4", "data.test_items=4",
        "data.max_val_items=4", "data.final_val_items=4", "data.max_length=64",
    ]  # fmt: skip
    assert check(load("remix_vs_mixtures"), words) == {}


def test_the_transfer_study_trains_its_skills_first(tmp_path: Path) -> None:
    transfer = load("mhr_transfer")
    assert transfer.sources("mhr_z") == ["skills_mhr"]
    assert "skills_mhr" not in transfer.compared
    jobs = plan(transfer, [3], tmp_path)
    arms = [job.title.removesuffix(" seed 3") for job in jobs]
    assert arms.index("skills_mhr") < arms.index("mhr_z")
    skills = tmp_path / "mhr_transfer" / "skills_mhr" / "seed_3"
    job = jobs[arms.index("mhr_z")]
    assert job.after == (skills,)
    assert f"adapter.adapt_from={skills}/adapter" in job.words


def test_an_arm_does_not_start_from_a_failed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = study(tmp_path / "s")
    path = found.run_path(tmp_path, "before", 0)
    path.mkdir(parents=True)
    (path / "status.json").write_text('{"state": "failed"}')
    jobs = [job for job in plan(found, [0], tmp_path) if job.title == "after seed 0"]
    assert run(found, jobs, tmp_path, workers=1) == 1
    assert "the run that it builds on failed" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["x={run:nobody}"], ["x={run:after}"]])
def test_an_arm_builds_on_arms_that_stand_alone(tmp_path: Path, words: list[str]) -> None:
    arms = {"alone": [], "before": [], "after": ["x={run:before}"], "wrong": words}
    with pytest.raises(ValueError, match="must be an arm that stands alone"):
        study(tmp_path / "s", arms=arms)


def test_the_numbers_of_a_fine_tuning_run(tmp_path: Path) -> None:
    finished(tmp_path / "seed_0", 0.75)
    row = read_run(tmp_path / "seed_0")
    assert row["accuracy"] == row["accuracy_of_b"] == 0.75
    assert (row["loss"], row["base_accuracy"], row["trainable_parameters"]) == (0.5, 0.1, 7)
    assert row["lowest_probs_ess"] == 1.5  # of any layer and step, not the mean over layers


def test_runs_that_others_build_on_are_not_compared(tmp_path: Path) -> None:
    found = study(tmp_path / "s")
    for arm, accuracy in (("after", 0.75), ("alone", 0.5), ("before", 0.9)):
        tasks = "other" if arm == "before" else "one"
        finished(found.run_path(tmp_path, arm, 0), accuracy, tasks=tasks)
    page = table(found, collect(found, [0], tmp_path), {})
    assert "| after | 1 | 0.750 | +0.250 |" in page
    assert "before" not in page
