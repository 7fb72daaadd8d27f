"""Warm-up, cosine decay and what decays."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from routerlab.objectives.optimizer import OptimizerRecipe

ADAMW = partial(torch.optim.AdamW, lr=0.5, weight_decay=0.1)


def test_factor_by_hand() -> None:
    recipe = OptimizerRecipe(ADAMW, warmup_steps=3, final_lr_ratio=0.2)
    # (step + 1) / 4, then from 1 at step 3 to .2 at step 11 along a cosine: half way is .6
    got = [recipe.factor(step, 11) for step in (0, 1, 2, 3, 7, 11, 20)]
    assert got == pytest.approx([0.25, 0.5, 0.75, 1, 0.6, 0.2, 0.2])
    quarter = 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2
    assert recipe.factor(5, 11) == pytest.approx(quarter)


def test_no_warmup_starts_at_the_peak() -> None:
    assert OptimizerRecipe(ADAMW, warmup_steps=0).factor(0, 10) == 1


def test_matrices_decay_and_vectors_do_not() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1, bias=False))
    module[2].weight.requires_grad_(False)
    optimizer, scheduler = OptimizerRecipe(ADAMW, warmup_steps=3).build(module, 10)
    groups = [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [(1, 0.1), (3, 0.0)]  # one matrix; bias, scale, bias
    assert scheduler.get_last_lr() == [0.125, 0.125]  # 0.5 * 1/4


def test_factors_on_the_learning_rate() -> None:
    module = nn.ModuleDict({"table": nn.Linear(3, 2), "other": nn.Linear(2, 1, bias=False)})
    recipe = OptimizerRecipe(ADAMW, 3, lr_factors={"table": 100, "table.bias": 0.5})
    optimizer, scheduler = recipe.build(module, 10)
    names = {id(p): name for name, p in module.named_parameters()}
    found = [([names[id(p)] for p in g["params"]], g["lr"]) for g in optimizer.param_groups]
    assert found == [
        (["other.weight"], 0.125),  # 0.5 * 1/4; what has no factor comes first, and is logged
        (["table.bias"], 6.25),  # 100 * 0.5
        (["table.weight"], 12.5),
    ]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0, 0.1]
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [0.5, 25.0, 50.0]


def test_factors_are_checked() -> None:
    with pytest.raises(ValueError, match=r"lr_factors\['table'\]=0: must be above 0"):
        OptimizerRecipe(ADAMW, lr_factors={"table": 0})
    with pytest.raises(ValueError, match=r"lr_factors\['tabel'\]: no trainable .* such as weight"):
        OptimizerRecipe(ADAMW, lr_factors={"tabel": 2.0}).build(nn.Linear(2, 1), 10)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps=-1: must be 0 or more"):
        OptimizerRecipe(ADAMW, warmup_steps=-1)
    with pytest.raises(ValueError, match=r"final_lr_ratio=2.0: must be from 0 to 1"):
        OptimizerRecipe(ADAMW, final_lr_ratio=2.0)
