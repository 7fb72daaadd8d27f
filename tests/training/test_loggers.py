"""Where numbers go: the files of a run directory."""

import csv
import json
from pathlib import Path

from routerlab.training.loggers import MetricsFiles


def test_a_new_scalar_adds_a_column_and_keeps_what_was_there(tmp_path: Path) -> None:
    files = MetricsFiles(tmp_path)
    files.log_metrics({"train/loss": 0.1 + 0.2}, 1)
    files.log_metrics({"val/loss": 2.0}, 1)
    files.log_metrics({"train/loss": 1.5, "val/loss": 1.0}, 2)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert rows == [
        {"step": "1", "train/loss": "0.30000000000000004", "val/loss": ""},  # all digits are kept
        {"step": "1", "train/loss": "", "val/loss": "2.0"},
        {"step": "2", "train/loss": "1.5", "val/loss": "1.0"},
    ]
    assert files.has(1, "val/loss")
    assert not files.has(3, "val/loss")


def test_rewind_forgets_later_steps_and_torn_lines(tmp_path: Path) -> None:
    files = MetricsFiles(tmp_path)
    for step in (1, 2, 3):
        files.log_metrics({"a": float(step)}, step)
        files.log_distributions({"load": [0.5, 0.5]}, step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,1")  # a number cut short looks like a number
    with (tmp_path / "distributions.jsonl").open("a") as file:
        file.write('{"step": 2, "na')
    again = MetricsFiles(tmp_path)  # as a resumed process sees it
    again.rewind(2)
    again.log_metrics({"a": 9.0}, 3)
    assert [row["a"] for row in again.rows()] == ["1.0", "2.0", "9.0"]
    lines = (tmp_path / "distributions.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
