"""`routerlab bench recording`: equal passes, rows, the file."""

import json
from pathlib import Path

import pytest
import torch

from routerlab.bench import recording
from routerlab.bench.command import main
from routerlab.bench.layer import Settings
from routerlab.bench.moe_sizes import MoeSizes
from routerlab.bench.recording import GOAL, bench_recording

SMALL = MoeSizes(2, 16, 8, 4, 2, 2, 32, batch_size=4, sequence_length=8)


def test_rows_are_of_equal_passes() -> None:
    said: list[str] = []
    rows = bench_recording(SMALL, Settings(1e-3, torch.device("cpu")), said.append)
    assert [row.name for row in rows] == said
    assert said == ["forward", "forward, padded", "forward and backward"]
    assert all(row.lower <= row.ratio <= row.upper and row.samples >= 3 for row in rows)
    assert [row.met for row in rows] == [rows[0].ratio <= GOAL, rows[1].ratio <= GOAL, None]


def test_padding_is_the_same_for_both() -> None:
    work = recording._Work(SMALL, torch.device("cpu"))
    valid = work.arguments(padded=True)["attention_mask"].bool()
    assert valid.sum(1).tolist() == [4, 8, 4, 8]
    context = work.context(padded=True)
    assert context.valid is not None
    assert torch.equal(context.valid.view(4, 8), valid)
    assert work.arguments(padded=False) == {}
    before = work.ids
    work.draw()
    assert not torch.equal(work.ids, before)


def test_the_command_writes_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    sizes = ["--num-layers=1", "--d-model=16", "--num-experts=4", "--sequence-length=8"]
    assert main(["recording", *sizes, "--seconds", "0.001", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 3
    assert found["sizes"]["num_experts"] == 4
    assert "forward, padded" in capsys.readouterr().out
