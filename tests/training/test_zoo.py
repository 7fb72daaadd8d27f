"""Every router of configs/router takes an optimizer step under the config of its own file."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from routerlab.comparison.frame import compare
from routerlab.core.config import available, compose
from routerlab.objectives.causal_lm import CausalLM
from routerlab.objectives.lookahead import looks_ahead
from routerlab.objectives.rehearsal import rehearse
from routerlab.objectives.router_state import update_routers
from routerlab.training.assemble import build_objective
from routerlab.training.evaluate import evaluate, load_objective
from routerlab.training.run_directory import RunDirectory
from routerlab.training.summary import print_headline

LEAKING = {"expert_choice", "expert_choice_capped"}
NEED_TASKS = {"by_task"}  # and are refused where text has none


def built(words: list[str], *more: str) -> CausalLM:
    torch.manual_seed(0)
    objective = build_objective(compose(*words, "backbone.num_experts=8", *more))
    assert isinstance(objective, CausalLM)
    return objective


@pytest.mark.parametrize("router", available("router"))
def test_one_step(router: str, tiny_words: Callable[..., list[str]]) -> None:
    leaks = [f"objective.allow_noncausal={str(router in LEAKING).lower()}"]
    objective = built(tiny_words(), f"router={router}", *leaks)
    if router in NEED_TASKS:
        with pytest.raises(ValueError, match="train on data that has tasks"):
            rehearse(objective)
    else:
        rehearse(objective)
    ids = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "domain": torch.zeros(4).long()}
    batch["task"] = torch.arange(4)
    terms, _, states = objective.accumulate([batch], [objective.context(batch, 0, 0)], due=True)
    assert all(math.isfinite(value) for value in terms.values())
    learned = [layer.router.parameters() for layer in objective.backbone.moe_layers.values()]
    grads = [p.grad for parameters in learned for p in parameters]
    assert all(g is None or g.isfinite().all() for g in grads)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    update_routers(objective._routers(), states)
    moved = {n for n, value in objective.state_dict().items() if not torch.equal(value, before[n])}
    assert bool(moved) is any(states)
    assert not moved & {name for name, _ in objective.named_parameters()}


def test_each_file_brings_the_losses_and_the_balancer_of_its_paper() -> None:
    losses = {
        "noisy_top_k": ["importance", "load_cv"],
        "switch": ["load_balancing"],
        "st_moe": ["load_balancing", "router_z"],
        "deepseek_v3": ["sequence_balance"],
        "base": [],
        "round_robin": [],
    }
    for router, expected in losses.items():
        assert list(compose(f"router={router}").get("loss") or {}) == expected
    assert compose("router=deepseek_v3").balancer.rate == 0.001
    ours = compose("router=deepseek_v3", "balancer=none", "loss=[router_z]")
    assert not ours.balancer
    assert list(ours.loss) == ["router_z"]


def test_who_leaks(tiny_words: Callable[..., list[str]]) -> None:
    allowed = "objective.allow_noncausal=true"
    marks = {r: looks_ahead(built(tiny_words(), f"router={r}", allowed).backbone)
             for r in ("token_choice", "gshard", "sinkhorn", "expert_choice")}  # fmt: skip
    assert marks == {
        "token_choice": "no",
        "gshard": "in training",
        "sinkhorn": "in training",
        "expert_choice": "in evaluation",
    }


@pytest.mark.parametrize("pattern", ["descending", "wave"])
def test_layerwise_experts(pattern: str, tiny_words: Callable[..., list[str]]) -> None:
    words = [f"schedule=[{pattern}]", "schedule.layerwise.total=12", "backbone.num_layers=3"]
    objective = built(tiny_words(), *words, "router.top_k=1", "router.normalize_weights=false")
    assert objective.backbone.count_parameters()["experts"] == 12
    rehearse(objective)


def test_a_leaking_run_is_marked_everywhere(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(
        "router=expert_choice", "objective.allow_noncausal=true", "name=leaks",
        "loss=[router_z]", logger="logger=[wandb]",
    )  # fmt: skip
    clean = train("name=clean", "data.final_val_windows=8", "schedule=[linear]",
                  "schedule.linear.target=router.top_k", "schedule.linear.start=3",
                  "schedule.linear.end=1.6")  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert summary["looks_ahead"] == "in evaluation"
    assert summary["layers"][0]["experts_per_token"] == pytest.approx(2)
    table = compare([run, clean])
    assert table["looks_ahead"].tolist() == ["in evaluation", "no"]
    report = (run / "report.html").read_text()
    assert 'id="leak"' in report
    assert "leaking the future" in report
    assert 'id="leak"' not in (clean / "report.html").read_text()
    print_headline(RunDirectory.existing(run))
    assert "leaks the future" in " ".join(capsys.readouterr().out.split())
    summary = json.loads((clean / "summary.json").read_text())
    assert summary["layers"][0]["experts_per_token"] == 2  # 3, then 2: rounded


def test_evaluating_a_checkpoint_uses_the_schedule_at_its_step(train: Callable[..., Path]) -> None:
    words = ["schedule=[step]", "schedule.step.target=router.top_k", "schedule.step.values=[3,1]"]
    run = train("name=scheduled", "router.normalize_weights=false", *words,
                "schedule.step.boundaries=[0.5]")  # fmt: skip
    objective, *_ = load_objective(RunDirectory.existing(run))
    assert [r.top_k for r in objective._routers().values()] == [1, 1]
    found = evaluate(compose(f"run={run}", "max_val_windows=null", config_name="eval"))
    summary = json.loads((run / "summary.json").read_text())
    assert found["metrics"]["val/loss"] == summary["val"]["loss"]
    assert found["metrics"]["val/router/layers.00/experts_per_token"] == 1
