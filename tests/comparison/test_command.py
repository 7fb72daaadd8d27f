"""``routerlab compare`` as a user calls it."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from routerlab.cli.main import main
from routerlab.comparison.formats import print_text
from routerlab.comparison.runs import load_runs
from routerlab.comparison.table import compare_groups
from tests.helpers import runs

MARKS = {"summary": {"tokens": 4096, "looks_ahead": "in evaluation", "flops_per_token": 2.5e6}}


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two routers of three seeds, a third that is no fair comparison, one failed, one broken."""
    folder = tmp_path_factory.mktemp("sweeps") / "routers"
    for seed, (one, other) in enumerate([(3.0, 2.9), (3.2, 3.05), (3.1, 3.02)]):
        words = [f"seed={seed}"]
        runs.finished_run(folder / f"token_choice_{seed}", words, bits=one)
        runs.finished_run(folder / f"hash_{seed}", ["router=hash", *words], bits=other)
    leaks = ["router=expert_choice", "objective.allow_noncausal=true"]
    runs.finished_run(folder / "expert_choice_0", leaks, bits=1.5, **MARKS)
    runs.finished_run(folder / "hash_3", ["router=hash", "seed=3"], state="failed", bits=None)
    broken = runs.finished_run(folder / "broken", ["seed=4"])
    (broken / "config.yaml").write_text("router: {")
    return folder


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal as rich sees it where there is none."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "dumb")


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What was printed, on one line, and as errors."""
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.usefixtures("narrow")
def test_the_table_in_a_terminal(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(sweep)]) == 0
    out, err = said(capsys)
    assert max(map(len, out.splitlines())) <= 100
    assert err == ""
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    # differences -0.1, -0.15, -0.08: mean -0.11, sd 0.0360555, half 0.0895669, t = 5.284
    for word in ("hash *", "2.9900 ± 0.1972", "3 +1 failed", "-0.1100 ± 0.0896", "0.034", "35.3k"):
        assert word in lines["hash"], word
    assert "baseline" in lines["token_choice"]
    assert "-1.5000 ± –" in lines["expert_choice"]
    assert "tokens, leaks" in " ".join(out.split())
    flowing = " ".join(out.split())
    assert f"warning: {sweep / 'broken'} is skipped: config.yaml is not valid YAML" in flowing
    assert "Not finished, left out: 1 run (hash_3: failed)." in flowing
    assert "Unfair: other tokens seen than token_choice by more than 1%" in flowing
    assert "These numbers are not those of a language model." in flowing
    assert "p: paired t-test, two-sided." in flowing  # one test: expert_choice has one seed
    assert "One seed in common with token_choice" in flowing
    assert "objective.allow_noncausal: true (expert_choice); else false" in flowing


def test_a_narrow_terminal_cuts_no_number(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = compare_groups(load_runs([sweep])[0])
    for width in (100, 80):
        print_text(comparison, Console(width=width))
        out = said(capsys)[0]
        assert max(map(len, out.splitlines())) <= width
        for word in ("2.9900 ± 0.1972", "-0.1100 ± 0.0896", "0.034", "3 +1 failed"):
            assert word in out, (width, word)
        assert ("2,048" in out) == (width == 100)


def test_all_formats(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("a.md", "a.csv", "a.json")]
    words = ["compare", str(sweep), *(w for file in files for w in ("--out", str(file)))]
    assert main(words) == 0
    assert all(f"wrote {file}" in said(capsys)[1] or file.is_file() for file in files)
    page = files[0].read_text()
    assert f"routerlab {' '.join(words)}\n" in page
    assert "| **hash *** | 2.9900 ± 0.1972 | 3 +1 failed | 2.9000 (hash_0) |" in page
    assert "## Warnings" in page
    assert "| router.seed | 0 (hash); else none |" in page
    with files[1].open(newline="") as file:
        table = {row["label"]: row for row in csv.DictReader(file)}
    assert list(table) == ["expert_choice", "hash", "token_choice"]
    assert float(table["hash"]["mean"]) == (2.9 + 3.05 + 3.02) / 3
    assert table["hash"]["unfinished"] == "1 failed"
    assert table["expert_choice"]["marks"] == "tokens, leaks"
    assert (table["expert_choice"]["half"], table["token_choice"]["p"]) == ("", "")
    assert float(table["expert_choice"]["flops_per_token"]) == 2.5e6
    found = json.loads(files[2].read_text())
    assert found["baseline"] == "token_choice"
    by_label = {row["label"]: row for row in found["rows"]}
    assert by_label["hash"]["values"] == {"0": 2.9, "1": 3.05, "2": 3.02}
    assert [(r["run"], r["value"]) for r in found["groups"]["hash"]][0] == ("hash_0", 2.9)
    assert found["groups"]["hash"][0]["path"] == str(sweep / "hash_0")
    assert len(found["warnings"]) == 4


@pytest.mark.parametrize(
    ("name", "start"), [("markdown", "# val/"), ("csv", "label,"), ("json", "{")]
)
def test_formats_on_the_standard_output(
    name: str, start: str, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(sweep), "--format", name]) == 0
    out, err = said(capsys)
    assert out.startswith(start)
    assert ("broken is skipped" in err) == (name == "csv")  # which has no room for it
    assert json.loads(out)["metric"] == "val/bits_per_byte" if name == "json" else True


def test_words_that_are_wrong(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        (): "give directories of runs, or --wandb",
        (str(tmp_path / "nowhere"),): "no such directory",
        (str(tmp_path / "empty"),): "holds no runs",
        (str(sweep / "hash_3"),): "no finished runs: 1 run (hash_3: failed)",
        (str(sweep / "broken"),): "no finished runs",
        (str(sweep), "--metric", "val/bits_per_bite"): "did you mean 'val/bits_per_byte'",
        (str(sweep), "--by", "routr"): "did you mean 'router'",
        (str(sweep), "--baseline", "hush"): "did you mean 'hash'",
        (str(sweep), "--out", "a.xlsx"): "no format for '.xlsx'",
        (str(sweep), "--out", str(tmp_path / "no" / "a.md")): "there is no directory",
        (str(sweep), "--group", "routers"): "--wandb entity/project, too",
    }
    for words, expected in cases.items():
        assert main(["compare", *words]) == 2, words
        err = said(capsys)[1]
        assert err.splitlines()[-1].startswith("error: "), words
        assert expected in err, words
    assert not list(tmp_path.glob("a.*"))


def test_a_broken_run_is_named_before_the_error(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(sweep / "broken")]) == 2
    assert "broken is skipped: config.yaml is not valid YAML" in said(capsys)[1]


def test_two_real_runs(finished_run: Path, train: Callable[..., Path], tmp_path: Path) -> None:
    other = train("router=hash", "name=other", "loss=[router_z]")
    page = tmp_path / "two.json"
    words = [finished_run, other, "--baseline", "token_choice", "--out", page]
    code = (
        "import sys; from routerlab.cli.main import main; code = main(sys.argv[1:]); "
        "print('heavy:', {'torch', 'lightning', 'wandb'} & sys.modules.keys()); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "heavy: set()" in done.stdout
    found = json.loads(page.read_text())
    summaries = {"hash": other, "token_choice": finished_run}
    for row in found["rows"]:
        summary = json.loads((summaries[row["label"]] / "summary.json").read_text())
        assert row["mean"] == summary["val"]["bits_per_byte"]
        assert row["active_parameters"] == summary["parameters"]["active"]
        assert row["flops_per_token"] == summary.get("flops_per_token")
        assert (row["steps"], row["tokens"]) == (4, 1024)
        assert not {"data", "batch", "steps", "tokens", "leaks"} & set(row["marks"])
    assert found["varying"]["router"] == {"hash": "hash", "token_choice": "token_choice"}
    assert found["varying"]["loss.load_balancing.weight"]["hash"] is None


def test_without_a_key_wandb_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "online")
    assert main(["compare", "--wandb", "entity/project"]) == 2
    assert "needs a key" in said(capsys)[1]
    assert main(["compare", "--wandb", "project"]) == 2
    assert "must be entity/project" in said(capsys)[1]


def test_a_server_that_does_not_answer_is_no_hang(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_MODE", "online")
    assert main(["compare", "--wandb", "entity/project"]) == 2
    assert "a server that answers" in said(capsys)[1]
