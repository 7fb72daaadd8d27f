"""The layer on a GPU: right, and without waiting for it. On a CPU, the same checks of the first."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.core.config import compose
from routerlab.core.routing import RoutingContext
from routerlab.dispatch.loop import Loop
from routerlab.moe.layer import DISPATCHES, MoE
from routerlab.routers.token_choice import TokenChoice
from routerlab.training.assemble import build_objective
from tests.helpers.distributed import run_distributed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest entry
ROUTERS = {
    "top 2": partial(TokenChoice, top_k=2),
    "switch": partial(TokenChoice, top_k=1, normalize_weights=False),
    "capacity": partial(TokenChoice, top_k=2, capacity_factor=0.7),
}


def _results(
    layer: MoE, x: Tensor, context: RoutingContext | None = None, run: Any = None
) -> dict[str, Tensor]:
    x = x.to(layer.experts.gate_up_proj.dtype, copy=True).requires_grad_()
    layer.zero_grad()
    y, output = (layer if run is None else run)(x, context)
    (y.double().square().sum() + output.router_probs.double().square().sum()).backward()
    grads = {name: p.grad.double() for name, p in layer.named_parameters()}
    return {"y": y.detach().double(), "x": x.grad.double()} | grads


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dispatch", sorted(set(DISPATCHES) - {"blocks"}))  # which is for a CPU
@pytest.mark.parametrize("case", [*ROUTERS, "padding", "one token", "no token", "skewed", "odd"])
def test_equals_the_loop_in_float64(
    case: str, dispatch: str, dtype: torch.dtype, device: str
) -> None:
    if (case, dispatch) == ("odd", "grouped"):
        pytest.skip("refused where rows are no multiples of 16 bytes")
    widths = (20, 12) if case == "odd" else (32, 16)
    arguments = (*widths, 16, partial(ROUTERS.get(case, ROUTERS["top 2"]), init_std=1.0))
    layer = MoE(*arguments, num_shared_experts=1, dispatch=dispatch)
    layer = layer.to(device=device, dtype=dtype)
    exact = MoE(*arguments, num_shared_experts=1, dispatch=Loop()).to(device).double()
    exact.load_state_dict(layer.state_dict())
    num_tokens = {"one token": 1, "no token": 0}.get(case, 40)
    x = torch.randn(num_tokens, widths[0]).to(device, dtype)
    if case == "skewed":
        x = 1 + x * 0.01
    valid = torch.arange(num_tokens, device=device) % 3 > 0
    context = RoutingContext(1, num_tokens, valid=valid if case == "padding" else None)
    got, wanted = (_results(one, x, context) for one in (layer, exact))
    for name, value in wanted.items():
        scale = value.abs().max().clamp(min=1e-6) if value.numel() else 1
        torch.testing.assert_close(got[name] / scale, value / scale, rtol=0, atol=TOLERANCE[dtype])


@needs_gpu
def test_a_step_waits_for_the_gpu_once() -> None:
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch's grouped product is a loop of the host on this GPU, and waits itself")
    words = ("experiment=quickstart", "backbone.num_layers=3")
    objective = build_objective(compose(*words)).cuda()
    ids = torch.randint(256, (8, 129), device="cuda")
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "domain": ids[:, 0] % 4}
    for attempt in range(2):  # the first makes handles and work spaces
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with torch.autocast("cuda", torch.bfloat16):
                    objective.accumulate([batch], [objective.context(batch, 0, 0)], due=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in caught if "synchronizing CUDA" in str(w.message)]
        assert len(waits) <= 1 or not attempt, waits


def _compiled(device: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    layer = MoE(32, 16, 16, partial(TokenChoice, top_k=2, init_std=1.0), dispatch="auto")
    layer = layer.to(device=device, dtype=dtype)
    x = torch.randn(40, 32, device=device)
    compiled = torch.compile(layer, fullgraph=True)
    return [_results(layer, x, run=run) for run in (compiled, layer)]


@pytest.mark.slow  # needs a C++ compiler
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.float32, marks=needs_gpu),
        pytest.param("cuda", torch.bfloat16, marks=needs_gpu),
    ],
)
def test_compiled_by_inductor(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # in a child process: jaxtyping's import hook, on in this one, cannot be traced
    arguments = (device, dtype)
    ((compiled, eager),) = run_distributed(
        _compiled, *arguments, world_size=1, tmp_path=tmp_path, timeout=580
    )
    for name, value in eager.items():
        got, scale = compiled[name], value.abs().max()
        torch.testing.assert_close(got / scale, value / scale, rtol=0, atol=TOLERANCE[dtype])
