"""The readers against files that a kill, a resume or a divergence left behind."""

import json
from pathlib import Path

import numpy as np
import pytest

from routerlab.reports import figures, tables
from routerlab.reports.run_files import Curve, curve, last, read_run


def test_after_a_resume_the_last_row_of_a_step_counts(tmp_path: Path) -> None:
    rows = "step,train/loss,val/loss\n1,5,\n2,4,\n3,3,9\n2,4.5,\n3,3.5,\n"
    (tmp_path / "metrics.csv").write_text(rows)
    metrics = read_run(tmp_path).metrics
    logged = curve(metrics, "train/loss")
    assert logged.steps.tolist() == [1, 2, 3]
    assert logged.values.tolist() == [5, 4.5, 3.5]
    assert last(metrics, "val/loss") == 9
    assert last(metrics, "val/nothing") is None


def test_divergence_is_reported_and_blanks_are_not(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,5\n2,\n3,nan\n4,inf\n")
    run = read_run(tmp_path)
    assert "train/loss is not finite in 2 rows, first at step 3." in run.notes
    assert curve(run.metrics, "train/loss").values.tolist() == [5]


@pytest.mark.parametrize("text", ["", "\n", "step\n", "step,train/loss\n", "loss\n1\n", "ste"])
def test_metrics_without_rows(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    assert read_run(tmp_path).metrics.empty


def test_unreadable_distribution_lines_are_counted(tmp_path: Path) -> None:
    good = json.dumps({"step": 1, "name": "router/layers.00/expert_load", "value": [0.5, 0.5]})
    ragged = json.dumps({"step": 2, "name": "x", "value": [[1], [1, 2]]})
    (tmp_path / "distributions.jsonl").write_text(f"{good}\n{{}}\nnot json\n3\n{ragged}\n\n")
    run = read_run(tmp_path)
    assert list(run.distributions) == ["router/layers.00/expert_load"]
    assert "4 lines of distributions.jsonl could not be read; ignored." in run.notes


def test_thinning_keeps_a_single_spike() -> None:
    values = np.ones(20_000)
    values[12_345] = 99
    thinned = figures.keep_extremes(Curve(np.arange(20_000.0), values))
    assert len(thinned) <= figures.MAX_POINTS
    assert thinned.steps[thinned.values.argmax()] == 12_345
    assert thinned.values.max() == 99


def test_bin_means_keep_the_mean() -> None:
    binned = figures.bin_means(Curve(np.arange(3000.0), np.arange(3000.0) ** 2))
    assert len(binned) == figures.MAX_BINS
    assert binned.values.mean() == pytest.approx(np.mean(np.arange(3000.0) ** 2))
    assert binned.steps[0] == 4.5


def test_running_mean_is_centred_and_keeps_a_line_straight() -> None:
    line = Curve(np.arange(400.0), np.arange(400.0))
    inside = slice(20, -20)
    assert figures.smoothing_window(line) == 11
    assert figures.running_mean(line).values[inside] == pytest.approx(line.values[inside])


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (tables.digits(2.1), "2.100"),
        (tables.digits(0.0), "0"),
        (tables.digits(12345.6), "1.235e+04"),
        (tables.digits(None), "–"),
        (tables.amount(987_654.0), "988k"),
        (tables.amount(2_345_678.0), "2.35M"),
        (tables.amount(999.9), "999.9"),
        (tables.duration(4.21), "4.21s"),
        (tables.duration(93.4), "1m 33s"),
        (tables.duration(3599.8), "1h 00m"),
        (tables.duration(7500.0), "2h 05m"),
    ],
)
def test_numbers_are_written_short(shown: str, expected: str) -> None:
    assert shown == expected
