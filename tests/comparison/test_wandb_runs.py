"""Runs of W&B become ours: as its own client reads what the server would send.

The server itself is not asked: that part is unproved here.
"""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from wandb.apis.public import Run as WandbRun

from routerlab.comparison.runs import BrokenRunError
from routerlab.comparison.table import compare_groups
from routerlab.comparison.wandb_runs import from_wandb
from routerlab.reports.run_files import curve

HISTORY = [
    {"_step": 0, "_timestamp": 1.0, "trainer/global_step": 1, "train/loss": 3.0},
    {"_step": 1, "trainer/global_step": 2, "train/loss": 2.5},
    {"_step": 2, "trainer/global_step": 2, "val/loss": 2.25,
     "router/layers.00/expert_load": {"_type": "histogram"}},
    {"_step": 3, "trainer/global_step": 1, "train/loss": "NaN"},
    {"_step": 4, "something": 1.0},
]  # fmt: skip


def on_server(
    router: str = "hash", seed: int | None = 0, bits: float = 2.5, state: str = "finished"
) -> WandbRun:
    """A run as the client makes it of the server's answer, its history in place of the next."""
    config = {"seed": seed, "router": {"_target_": f"x.{router}.X", "top_k": 2},
              "data": {"seed": seed, "seq_len": 32}, "choices": {"router": router}}  # fmt: skip
    summary = {
        "final/bits_per_byte": bits, "final/loss": bits * 0.7, "val/loss": {"min": 1.0},
        "steps": 4, "tokens": 1024, "tokens_per_second": 99.5, "looks_ahead": "no",
        "flops_per_token": 1e6, "parameters": {"total": 20, "active": 10}, "_runtime": 3,
    }  # fmt: skip
    attributes = {
        "name": "1a2b3c4d",
        "displayName": f"{router}_{seed}",
        "state": state,
        "createdAt": "2026-01-01T00:00:00Z",
        "config": json.dumps({k: {"value": v} for k, v in config.items()}),
        "summaryMetrics": json.dumps(summary),
        "systemMetrics": "{}",
        "user": {"name": "someone", "username": "someone"},
    }
    service: Any = SimpleNamespace()
    run = WandbRun(service, "entity", "project", "1a2b3c4d", attrs=attributes)
    run.scan_history = lambda: iter(HISTORY)  # type: ignore[method-assign, assignment]
    return run


def test_a_run_of_the_server_says_what_a_directory_says() -> None:
    run = from_wandb(on_server())
    assert (run.name, run.path, run.state, run.seed) == ("hash_0", None, "done", 0)
    assert run.config["router.top_k"] == 2
    assert run.choices == {"router": "hash"}
    assert not any(key.startswith("choices") for key in run.config)
    assert run.summary["parameters"] == {"total": 20, "active": 10}
    assert run.value("val/bits_per_byte") == 2.5
    assert run.value("val/loss") == 1.75  # of the last evaluation, not the best
    assert run.science.keys() == {"router._target_", "router.top_k", "data.seq_len"}


def test_the_history_is_a_metrics_file() -> None:
    run = from_wandb(on_server())
    assert run.logged() == ["train/loss", "val/loss"]
    assert curve(run.metrics("train/loss"), "train/loss").values.tolist() == [3.0, 2.5]
    assert list(run.metrics("val/loss", "nothing")) == ["step", "val/loss"]
    assert run.value("train/loss") == 2.5


def test_states_are_ours() -> None:
    states = {"finished": "done", "crashed": "cut", "killed": "cut", "failed": "failed",
              "running": "running", "preempted": "preempted"}  # fmt: skip
    assert {theirs: from_wandb(on_server(state=theirs)).state for theirs in states} == states


def test_a_run_of_something_else_is_named() -> None:
    with pytest.raises(BrokenRunError, match="gives no seed"):
        from_wandb(on_server(seed=None))


def test_an_empty_history() -> None:
    theirs = on_server()
    theirs.scan_history = lambda: iter([])  # type: ignore[method-assign, assignment]
    run = from_wandb(theirs)
    assert run.logged() == []
    assert run.value("train/loss") is None


def test_runs_of_the_server_are_compared() -> None:
    theirs = [on_server("hash", 0, 2.5), on_server("hash", 1, 2.6),
              on_server("token_choice", 0, 2.7), on_server("token_choice", 1, 2.9)]  # fmt: skip
    found = compare_groups([from_wandb(run) for run in theirs])
    rows = {row["label"]: row for row in found.rows}
    assert rows["hash"]["difference"] == pytest.approx(-0.25)
    assert rows["hash"]["flops_per_token"] == 1e6
    assert rows["hash"]["active_parameters"] == 10
    assert found.warnings == []
