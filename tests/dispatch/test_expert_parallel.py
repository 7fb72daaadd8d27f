"""Experts on several processes give what one process gives."""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from routerlab.dispatch.expert_parallel import ExpertParallel
from routerlab.dispatch.least_loaded import LeastLoaded
from routerlab.experts.swiglu import SwiGLU
from routerlab.moe.layer import MoE
from routerlab.routers.token_choice import TokenChoice
from tests.dispatch.parallel_cases import (
    Case,
    D,
    F,
    check,
    crowded,
    inputs,
    on_one_process,
    run,
    run_cases,
    top_k,
)
from tests.helpers.distributed import run_distributed
from tests.helpers.records import record
from tests.training.test_train import rows

_RAGGED = torch.rand(9, 4, generator=torch.Generator().manual_seed(1)) < 0.4
CASES = {
    "even": Case((6, 6), top_k(12, 2)),
    "uneven": Case((9, 2), top_k(11, 2)),
    "all experts": Case((3, 4), top_k(7, 4)),
    "one process has no tokens": Case((8, 0), top_k(8, 2)),
    "one token": Case((0, 1), top_k(1, 1)),
    "one expert takes all": Case((5, 4), torch.full((9, 1), 3)),
    "empty experts": Case((4, 4), torch.tensor([[0, 3]]).expand(8, 2)),
    "any number of experts": Case((4, 5), mask=_RAGGED),
    "no assignment": Case((2, 3), mask=torch.zeros(5, 4, dtype=torch.bool)),
    "no token": Case((0, 0), top_k(0, 2)),
    "expanded gradient": Case((6, 3), top_k(9, 2), loss="sum"),
    "crowded": Case((60, 40), crowded(100, 0.95)),
    "float32": Case((9, 5), top_k(14, 2), dtype=torch.float32),
    "bfloat16": Case((30, 20), crowded(50, 0.8), dtype=torch.float32, autocast=True),
}
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.05}
KINDS = {"plain": ExpertParallel(), "lending": LeastLoaded(min_tokens=1, threshold=None)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list:
    return run_distributed(
        run_cases, CASES, KINDS, world_size=2, tmp_path=tmp_path_factory.mktemp("two")
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(answers: list, name: str, kind: str) -> None:
    ours = [answer[kind, name][0] for answer in answers]
    wanted = on_one_process(CASES[name])
    check(CASES[name], ours, TOLERANCES.get(name, 1e-10), wanted)


class Idle(SwiGLU):
    """Experts that save nothing for backward where there are no rows."""

    def forward(self, x: Tensor, tokens_per_expert: Tensor, combine_weights: Tensor) -> Tensor:
        if len(x):
            return super().forward(x, tokens_per_expert, combine_weights)
        return x + 0 * (self.gate_up_proj.sum() + self.down_proj.sum() + combine_weights.sum())


def _idle() -> Tensor:
    """Both processes' tokens go to the second; the gradient of ``x``."""
    torch.manual_seed(0)
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    experts = Idle(D, F, 4).double()
    dispatch = ExpertParallel()
    dispatch.shard(experts, init_device_mesh("cpu", (2,)))
    output = record(torch.full((5, 4), 0.25), torch.full((5, 1), 3))
    y = checkpoint(lambda x: dispatch(x.sin(), output, experts), x, use_reentrant=False)
    y.sum().backward()
    return x.grad


def test_recomputation_where_experts_save_less_without_rows(tmp_path: Path) -> None:
    first, second = run_distributed(_idle, world_size=2, tmp_path=tmp_path)
    torch.testing.assert_close(first, second)
    assert first.abs().min() > 0


# -- a model of two layers ------------------------------------------------------------------------


class Model(nn.Module):
    """Two MoE layers and a head."""

    def __init__(self, dispatch: ExpertParallel) -> None:
        super().__init__()
        torch.manual_seed(0)
        router = partial(TokenChoice, top_k=2, init_std=1.0)
        self.layers = nn.ModuleList(MoE(D, F, 4, router, dispatch=dispatch) for _ in range(2))
        self.head = nn.Linear(D, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)[0]
        return self.head(x)


def build(dispatch: ExpertParallel) -> tuple[Model, torch.optim.Optimizer]:
    """The model, on several processes sharded by expert and else by FSDP2, and its optimizer."""
    model = Model(dispatch)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        experts = [layer.experts for layer in model.layers]
        for each in experts:
            dispatch.shard(each, mesh)
        sharded = {p for each in experts for p in each.parameters()}
        fully_shard(model, mesh=mesh, ignored_params=sharded)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model: Model, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """A step on eight tokens, of which each process has its part; the mean loss of its tokens."""
    x = torch.randn(8, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if dist.is_initialized():
        x = x.chunk(dist.get_world_size())[dist.get_rank()]
    optimizer.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def same(got: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
    """Two checkpoints of weights and of the optimizer."""
    close(got[0], wanted[0])
    close(got[1]["state"], wanted[1]["state"])


def _train(kind: str, start: tuple[Any, Any] | None) -> tuple[list[float], tuple[Any, Any]]:
    dispatch = {**KINDS, "two replicas": ExpertParallel(size=2)}[kind]
    model, optimizer = build(dispatch)
    if start is not None:
        weights, moments = copy.deepcopy(start)  # the optimizer would go on working in these
        set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=_FULL
        )
    first = 0 if start is None else 3
    losses = [step(model, optimizer, seed) for seed in range(first, first + 3)]
    return losses, get_state_dict(model, optimizer, options=_FULL)


def mean_losses(answers: list) -> list[float]:
    """Of each step, over processes."""
    return torch.tensor([losses for losses, _ in answers], dtype=torch.float64).mean(0).tolist()


@pytest.mark.parametrize(
    ("kind", "world_size"), [("plain", 2), ("lending", 2), ("two replicas", 4)]
)
def test_training_and_checkpoints(kind: str, world_size: int, tmp_path: Path) -> None:
    """Three steps, a checkpoint, three more: on several processes, on one, and changing over."""
    one, saved_by_one = _train("plain", None)
    more, end = _train("plain", saved_by_one)
    assert more[-1] < one[0]
    answers = run_distributed(_train, kind, None, world_size=world_size, tmp_path=tmp_path)
    saved_by_all = answers[0][1]
    close(mean_losses(answers), one)
    same(saved_by_all, saved_by_one)
    losses, state = _train("plain", saved_by_all)
    close(losses, more)
    same(state, end)
    answers = run_distributed(_train, kind, saved_by_one, world_size=world_size, tmp_path=tmp_path)
    same(answers[0][1], end)
    close(mean_losses(answers), more)


# -- bad input ------------------------------------------------------------------------------------


def _refused(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def _refusals() -> list[str]:
    mesh, output = init_device_mesh("cpu", (2,)), record(torch.full((3, 4), 0.25), top_k(3, 1))
    flat = init_device_mesh("cpu", (1, 2))
    sharded, stacked = SwiGLU(D, F, 4), SwiGLU(D, F, 4)
    stacked.bias = nn.Parameter(torch.zeros(D))
    dispatch, x = ExpertParallel(), torch.randn(3, D)
    dispatch.shard(sharded, mesh)
    return [
        _refused(lambda: dispatch.shard(SwiGLU(D, F, 3), mesh)),
        _refused(lambda: ExpertParallel(size=3).shard(SwiGLU(D, F, 6), mesh)),
        _refused(lambda: dispatch.shard(SwiGLU(D, F, 4), flat)),
        _refused(lambda: dispatch.shard(sharded, mesh)),
        _refused(lambda: dispatch.shard(stacked, mesh)),
        _refused(lambda: dispatch(x, output, SwiGLU(D, F, 4))),
        _refused(lambda: dispatch(x.bfloat16(), output, sharded)),
    ]


def test_bad_input(tmp_path: Path) -> None:
    found = run_distributed(_refusals, world_size=2, tmp_path=tmp_path)
    assert found[0] == found[1]
    patterns = [
        "num_experts=3: the 2 processes",
        "dispatch.size=3: must divide the 2 processes",
        "must have one dimension",
        "experts.gate_up_proj: is sharded already",
        r"experts.bias: shape \[8\]",
        "not sharded.*trainer=fsdp",
        "tokens are torch.bfloat16 and the experts' weights torch.float32",
    ]
    for message, pattern in zip(found[0], patterns, strict=True):
        assert re.search(pattern, message), message


def test_one_process_needs_no_mesh() -> None:
    case = CASES["even"]
    check(
        case,
        [run(case, ExpertParallel(), 1, slice(None), inputs(case))],
        1e-10,
        on_one_process(case),
    )


# -- as users run it ------------------------------------------------------------------------------


def _run_the_example() -> float:
    """What the guide's script leaves: the largest change of a gate weight by its step."""
    os.environ["WORLD_SIZE"] = "2"  # as torchrun does
    torch.manual_seed(0)
    text = (Path(__file__).parents[2] / "docs" / "expert_parallel.md").read_text()
    found: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0], found)
    gate = found["layer"].router.gate.weight
    assert len(found["layer"].experts.gate_up_proj.to_local()) == 4
    return gate.grad.full_tensor().abs().max().item()


def test_the_example_of_the_guide(tmp_path: Path) -> None:
    first, second = run_distributed(_run_the_example, world_size=2, tmp_path=tmp_path)
    assert first == second > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["dispatch=expert_parallel", "objective.micro_batches=2"],
        ["dispatch=least_loaded", "dispatch.min_tokens=1", "dispatch.threshold=null"],
    ],
)
def test_a_run_of_two_processes_is_that_of_one(
    train: Callable[..., Path], tiny_words: Callable[..., list[str]], tmp_path: Path, words: list
) -> None:
    one, run = rows(train("name=one")), tmp_path / "two"
    words = [*words, "trainer=fsdp", "trainer.devices=2", f"run_dir={run}"]
    program = [sys.executable, "-m", "routerlab.cli.main", "train"]
    subprocess.run([*program, *tiny_words(*words)], check=True, timeout=280)
    for a, b in zip(one, rows(run), strict=True):
        assert a["step"] == b["step"]
        for key in a:
            if a[key] and key not in ("step", "train/tokens_per_second"):
                assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4, abs=1e-6), key
