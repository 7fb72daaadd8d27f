"""What makes a comparison unfair is marked in the row and said once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from routerlab.comparison.runs import load_runs
from routerlab.comparison.table import Comparison, compare_groups
from tests.helpers.runs import finished_run

PARAMETERS = {"total": 47584, "active": 35296, "trainable": 47584, "experts": 8}


@pytest.fixture
def against(tmp_path: Path) -> Callable[..., Comparison]:
    """A comparison of hash, with these settings, to a plain token_choice."""

    def compared(words: Sequence[str] = (), **settings: Any) -> Comparison:
        finished_run(tmp_path / "base", ["router=token_choice", "seed=0"])
        finished_run(tmp_path / "other", ["router=hash", "seed=0", *words], **settings)
        return compare_groups(load_runs([tmp_path])[0])

    return compared


def marks(comparison: Comparison) -> dict[str, list[str]]:
    """The marks of each row."""
    return {row["label"]: row["marks"] for row in comparison.rows}


def test_equal_rows_are_fair(against: Callable[..., Comparison]) -> None:
    found = against()
    assert marks(found) == {"token_choice": [], "hash": []}
    assert found.warnings == []


@pytest.mark.parametrize(
    ("words", "mark", "said"),
    [
        (["data.seq_len=64"], "data", "data.seq_len 64, not 256"),
        (["data.batch_size=4"], "batch", "data.batch_size 4, not "),
        (["objective.micro_batches=2"], "batch", "objective.micro_batches 2, not 1"),
        (["trainer.max_steps=7"], "steps", "trainer.max_steps 7, not "),
    ],
)
def test_configs_that_differ(
    words: list[str], mark: str, said: str, against: Callable[..., Comparison]
) -> None:
    found = against(words)
    assert marks(found) == {"token_choice": [], "hash": [mark]}
    [warning] = found.warnings
    assert warning.startswith(f"Unfair: other {mark} than token_choice: hash ({said}")
    assert words[0].split("=")[0] in found.varying


@pytest.mark.parametrize(
    ("summary", "mark"),
    [
        ({"steps": 5}, ["steps"]),
        ({"tokens": 1024 * 1.02}, ["tokens"]),
        ({"tokens": 1024 * 1.005}, []),
        ({"parameters": PARAMETERS | {"active": 35296 * 1.02}}, ["active"]),
        ({"parameters": PARAMETERS | {"active": 35296 * 0.98}}, ["active"]),
        ({"parameters": PARAMETERS | {"active": 35296 * 1.009}}, []),
        ({"parameters": PARAMETERS | {"total": 99999}}, []),
        ({"tokens_per_second": 1.0}, []),
    ],
)
def test_summaries_that_differ(
    summary: dict[str, Any], mark: list[str], against: Callable[..., Comparison]
) -> None:
    assert marks(against(summary=summary)) == {"token_choice": [], "hash": mark}


@pytest.mark.parametrize(("flops", "mark"), [(1.04e6, []), (1.06e6, ["FLOPs"])])
def test_flops_that_differ(tmp_path: Path, flops: float, mark: list[str]) -> None:
    for router, value in (("token_choice", 1e6), ("hash", flops)):
        finished_run(tmp_path / router, [f"router={router}"], summary={"flops_per_token": value})
    found = compare_groups(load_runs([tmp_path])[0])
    assert marks(found) == {"token_choice": [], "hash": mark}
    if mark:
        assert found.warnings == [
            "Unfair: other FLOPs per token than token_choice by more than 5%: hash (+6.0%)."
        ]


def test_the_reason_names_no_fixed_top_k(against: Callable[..., Comparison]) -> None:
    found = against(summary={"parameters": PARAMETERS | {"active": 70592}, "top_k": None})
    assert found.warnings == [
        "Unfair: other active parameters than token_choice by more than 1%: hash (+100.0%, every "
        "expert counted: no fixed top_k)."
    ]


def test_what_does_not_change_the_numbers_is_fair(against: Callable[..., Comparison]) -> None:
    words = ["data.cache_dir=/elsewhere", "data.num_workers=2", "trainer.accelerator=cpu",
             "trace_sequences=1", "name=other"]  # fmt: skip
    found = against(words)
    assert marks(found)["hash"] == []
    assert not {"data.cache_dir", "data.num_workers", "name"} & found.varying.keys()


def test_leaks_are_marked_and_never_the_best(tmp_path: Path) -> None:
    bits = {"token_choice": 3.0, "expert_choice": 1.0, "gshard": 2.0, "hash": 4.0}
    ahead = {"expert_choice": "in evaluation", "gshard": "in training"}
    for router, value in bits.items():
        words = [f"router={router}", "objective.allow_noncausal=true"]
        summary = {"looks_ahead": ahead.get(router, "no")}
        finished_run(tmp_path / router, words, bits=value, summary=summary)
    found = compare_groups(load_runs([tmp_path])[0])
    assert marks(found) == {
        "expert_choice": ["leaks"], "gshard": ["looks ahead"], "token_choice": [], "hash": [],
    }  # fmt: skip
    assert [row["label"] for row in found.rows if row["is_best"]] == ["gshard"]
    assert any("expert_choice. These numbers are not those of" in w for w in found.warnings)
    assert any(note.endswith("not in evaluation: gshard.") for note in found.notes)
    assert not any("gshard" in warning for warning in found.warnings)


def test_commits_and_devices_are_told_apart_in_a_line(
    against: Callable[..., Comparison],
) -> None:
    hardware = {"cpu": "some processor", "gpus": ["H100", "H100"]}
    found = against(environment={"commit": "fedcba98+changes", "hardware": hardware})
    assert marks(found)["hash"] == []
    assert found.warnings == []
    assert "The runs are of 2 commits: 0123456 (1), fedcba9+changes (1)." in found.notes
    [devices] = [note for note in found.notes if "devices" in note]
    assert "2 x H100 (1), some processor (1)" in devices
