"""`routerlab simulate`: what it prints, writes and refuses."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from routerlab.cli.main import main


def rows(tmp_path: Path, *words: str) -> list[dict]:
    """What the command writes as JSON."""
    assert main(["simulate", *words, "--json", str(tmp_path / "rows.json")]) == 0
    return json.loads((tmp_path / "rows.json").read_text())


def test_a_hot_layer_by_three_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ep, llep, copied = rows(tmp_path, "layer", "--hot", "0.5:4", "--devices", "8")
    assert [row["method"] for row in (ep, llep, copied)] == ["ep", "llep", "replication"]
    assert (ep["path"], llep["path"]) == ("ep", "llep")
    assert ep["max_load"] > 4 * llep["max_load"]
    assert llep["speedup"] == ep["seconds"] / llep["seconds"] > 3
    said = capsys.readouterr().out
    assert "not measured" in said
    line = next(line for line in said.splitlines() if " llep " in line).split()
    assert line[2:6] == ["8", "8", "llep", str(llep["max_load"])]
    assert line[-1] == f"{llep['speedup']:.2f}"


def test_balance_is_the_default_and_nothing_is_moved(tmp_path: Path) -> None:
    ep, llep, _ = rows(tmp_path, "layer", "--model", "kimi-k2", "--devices", "8")
    assert ep | {"method": "llep"} == llep
    assert (ep["case"], llep["transfers"]) == ("balanced", 0)
    assert 1 <= ep["imbalance"] < 1.001


def test_thousands_of_devices_in_groups(tmp_path: Path) -> None:
    words = ["layer", "--zipf", "1", "--devices", "64", "4096", "--group", "64"]
    found = rows(tmp_path, *words)
    few, many = found[:3], found[3:]
    assert [row["devices"] for row in many] == [4096] * 3
    assert [row["seconds"] for row in few] == [row["seconds"] for row in many]


def test_knobs_and_the_machine_are_heard(tmp_path: Path) -> None:
    words = ["layer", "--hot", "0.3:4", "--tokens", "4096"]
    base = rows(tmp_path, *words)
    loose = rows(tmp_path, *words, "--alpha", "2", "--extra", "0")
    assert loose[1]["max_load"] > base[1]["max_load"]
    assert loose[2]["max_load"] > base[2]["max_load"]
    assert rows(tmp_path, *words, "--threshold", "3")[1]["path"] == "ep"
    slow = rows(tmp_path, *words, "--set", "link=1e9")
    assert slow[0]["exchange_seconds"] > 100 * base[0]["exchange_seconds"]
    assert rows(tmp_path, *words, "--training")[0]["seconds"] > 2 * base[0]["seconds"]


@pytest.mark.parametrize("source", ["--run", "--trace"])
def test_loads_of_a_run(finished_run: Path, tmp_path: Path, source: str) -> None:
    words = ["layer", source, str(finished_run), "--devices", "2", "--min-tokens", "1"]
    found = rows(tmp_path, *words)
    assert len(found) == 2 * 3  # layers, methods
    assert found[0]["case"].startswith("layers.00")
    total = 32768 * 4 * 2  # tokens, top_k of gpt-oss, devices
    assert found[0]["max_load"] == pytest.approx(found[0]["imbalance"] * total / 2)


def test_a_model_by_strategy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--devices", "1", "64", "--checkpointing", "--hot", "0.5:4"]
    found = rows(tmp_path, "model", *words)
    keys = [(row["devices"], row["strategy"], row["group"], row["method"]) for row in found]
    assert keys == [
        (1, "ddp", 1, "none"), (1, "fsdp", 1, "none"), (64, "ddp", 1, "none"),
        (64, "fsdp", 1, "none"), (64, "fsdp", 8, "ep"), (64, "fsdp", 8, "llep"),
    ]  # fmt: skip
    assert [row["fits"] for row in found] == [False, False, False, True, True, True]
    parts = ("state_bytes", "working_bytes", "activation_bytes")
    assert all(row["memory_bytes"] == sum(row[part] for part in parts) for row in found)
    assert "MFU" in capsys.readouterr().out


def test_rows_as_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert main(["simulate", "layer", "--csv", str(path)]) == 0
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["method"] for row in found] == ["ep", "llep", "replication"]
    assert float(found[0]["speedup"]) == 1.0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("layer --devices 3", "group=3: .* must divide the 128 experts; both allow 1"),
        ("layer --devices 1024", "group=1024: .* 128 experts; both allow 1, 2, .*, 128"),
        ("layer --devices 12 --group 8", "group=8: .* the 12 devices"),
        ("layer --devices 0", "--devices=0: must be at least 1"),
        ("layer --model gpt-oss", "model=gpt-oss: no such model; did you mean 'gpt-oss-20b'"),
        ("layer --machine h20", "machine=h20: no such machine; did you mean 'h200'"),
        ("layer --hot 4", "--hot 4: must be SHARE:N"),
        ("layer --hot 2:4", "share=2.0: must be at least 0 and at most 1"),
        ("layer --hot 0.5:128", "num_hot=128"),
        ("layer --zipf -1", "exponent=-1.0"),
        ("layer --set lin=3", "--set lin=3: no such field; did you mean 'link'"),
        ("layer --set link=x", "--set link=x: 'x' is no number"),
        ("layer --set flops_reached=2", "flops_reached=2.0: must be .* at most 1"),
        ("layer --alpha 0", "alpha=0.0: must be above 0"),
        ("layer --threshold high", "--threshold=high: must be a number, or none"),
        ("layer --extra -1", "extra=-1"),
        ("layer --d-ff 0", "d_ff=0: must be above 0"),
        ("layer --tokens 0", "--tokens=0"),
        ("layer --run /nowhere", "'/nowhere': holds no run"),
        ("layer --trace /nowhere", "'/nowhere': no such trace"),
        ("layer --json /nowhere/x.json", "its folder does not exist"),
        ("model --model deepseek-v3", "model=deepseek-v3: no such model"),
        ("model --group 8 --strategy ddp", "nothing to compute"),
        ("model --hot 0.3:4 0.5:4", "take one value for a model"),
        ("layer --hot 0.3:4 --zipf 1", "not allowed with argument"),
        ("", "layer|model"),
    ],
)
def test_bad_input_is_named(words: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *words.split()]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(error, said.err), said.err


def test_synthetic_loads_need_no_torch() -> None:
    code = (
        "import sys; from routerlab.cli.main import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'lightning', 'hydra') if m in sys.modules])"
    )
    words = [sys.executable, "-c", code, "simulate", "model"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
