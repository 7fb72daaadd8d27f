"""The fused mixture: its engines, what they take, what they keep, and how they are chosen."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from routerlab.bench.memory import saved_mib
from routerlab.core.protocols import Dispatch
from routerlab.core.routing import RouterOutput
from routerlab.dispatch import fused
from routerlab.dispatch.autograd import Autograd
from routerlab.dispatch.fused import Fused, plan
from routerlab.dispatch.loop import Loop
from routerlab.experts.swiglu import SwiGLU
from routerlab.ops import swiglu_blocks
from routerlab.ops.swiglu_blocks import Block, cut
from tests.helpers.records import ragged_record, random_record, record

EXPERTS = 6
TOKENS = 300
_EVEN = torch.full((TOKENS, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
RECORDS: dict[str, RouterOutput] = {
    "top 2": random_record(TOKENS, EXPERTS, 2),
    "top 1": random_record(TOKENS, EXPERTS, 1),
    "all experts": random_record(TOKENS, EXPERTS, EXPERTS),
    "ragged": ragged_record(TOKENS, EXPERTS),
    "one expert takes all": record(_EVEN, torch.full((TOKENS, 1), 2)),
    "two busy experts": record(_EVEN, torch.tensor([[4, 1]]).expand(TOKENS, 2)),
    "padding": random_record(TOKENS, EXPERTS, 2, valid=torch.arange(TOKENS) % 3 > 0),
    "one token": random_record(1, EXPERTS, 2),
}
ENGINES = {
    f"{engine}{', recomputed' * recompute}": Fused(engine, recompute)
    for engine in ("blocks", "grouped")
    for recompute in (False, True)
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 rows, the least there are: several experts in one, and one in several."""
    monkeypatch.setattr(swiglu_blocks, "BLOCK_SIZE", 1)


def results(
    dispatch: Dispatch,
    output: RouterOutput,
    dtype: torch.dtype,
    widths: tuple[int, int] = (8, 12),
    backward: Callable[[Tensor], Any] = lambda y: (y.cos().sum() + y.square().sum()).backward(),
    autocast: bool = False,
) -> dict[str, Tensor]:
    """Output and all gradients, in float64."""
    torch.manual_seed(0)
    experts = SwiGLU(*widths, EXPERTS).to(dtype)
    x = torch.randn(len(output.router_logits), widths[0]).to(dtype).requires_grad_()
    weights = output.combine_weights.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = dispatch(x, replace(output, combine_weights=weights), experts)
    backward(y)
    named = {name: p.grad for name, p in experts.named_parameters()}
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad} | named
    assert all(value is not None and value.dtype == dtype for value in found.values())
    return {name: value.double() for name, value in found.items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, value in wanted.items():
        scale = value.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", RECORDS)
def test_equals_the_loop_in_float64(name: str, engine: str) -> None:
    exact = results(Loop(), RECORDS[name], torch.float64)
    assert_same(results(ENGINES[engine], RECORDS[name], torch.float32), exact, 2e-6)
    if engine.startswith("blocks"):
        assert_same(results(ENGINES[engine], RECORDS[name], torch.float64), exact, 1e-12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["top 2", "ragged", "two busy experts", "padding"])
def test_bf16_is_close_to_the_loop(name: str, engine: str) -> None:
    exact = results(Loop(), RECORDS[name], torch.float64, (16, 8))
    autocast = results(ENGINES[engine], RECORDS[name], torch.float32, (16, 8), autocast=True)
    assert_same(autocast, exact, 0.03)
    assert float((autocast["y"] - exact["y"]).abs().max()) > 1e-4  # it was computed in bf16
    assert_same(results(ENGINES[engine], RECORDS[name], torch.bfloat16, (16, 8)), exact, 0.04)


@pytest.mark.parametrize("widths", [(5, 3), (7, 9), (1, 1)])
def test_odd_widths(widths: tuple[int, int]) -> None:
    exact = results(Loop(), RECORDS["top 2"], torch.float64, widths)
    assert_same(results(Fused("blocks"), RECORDS["top 2"], torch.float32, widths), exact, 2e-6)
    assert_same(results(Fused(), RECORDS["top 2"], torch.float32, widths), exact, 2e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "backward",
    [
        lambda y: y.sum().backward(),  # a gradient that is one number, expanded
        lambda y: y.t().contiguous().t().backward(torch.ones(y.shape[::-1]).t().to(y.dtype)),
        lambda y: y[::2].square().sum().backward(),
    ],
    ids=["expanded", "transposed", "strided"],
)
def test_gradients_that_are_not_contiguous(engine: str, backward: Any) -> None:
    exact = results(Loop(), RECORDS["top 2"], torch.float64, backward=backward)
    found = results(ENGINES[engine], RECORDS["top 2"], torch.float32, backward=backward)
    assert_same(found, exact, 2e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute: bool) -> None:
    output = random_record(5, EXPERTS, 2)
    experts = SwiGLU(4, 3, EXPERTS).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weights = output.combine_weights.detach().double().requires_grad_()

    def run(x: Tensor, weights: Tensor, *_: Tensor) -> Tensor:
        return Fused("blocks", recompute)(x, replace(output, combine_weights=weights), experts)

    assert gradcheck(run, (x, weights, experts.gate_up_proj, experts.down_proj))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("learns", ["x", "combine_weights", "gate_up_proj", "down_proj"])
def test_only_what_learns_gets_a_gradient(learns: str, engine: str) -> None:
    output, experts = RECORDS["top 2"], SwiGLU(8, 12, EXPERTS)
    leaves = {
        "x": torch.randn(TOKENS, 8),
        "combine_weights": output.combine_weights.detach().float(),
        **dict(experts.named_parameters()),
    }
    found = []
    for dispatch in (ENGINES[engine], Autograd()):
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == learns).grad = None
        used = replace(output, combine_weights=leaves["combine_weights"])
        dispatch(leaves["x"], used, experts).square().sum().backward()
        found.append({name: leaf.grad for name, leaf in leaves.items()})
    assert [name for name, grad in found[0].items() if grad is not None] == [learns]
    assert_same({learns: found[0][learns]}, {learns: found[1][learns]}, 1e-5)


@pytest.mark.parametrize("engine", ["blocks", "grouped"])
def test_recomputing_keeps_no_gate_and_up(engine: str) -> None:
    output, experts = random_record(512, EXPERTS, 2), SwiGLU(16, 32, EXPERTS)
    output = replace(output, combine_weights=output.combine_weights.float())
    x = torch.randn(512, 16, requires_grad=True)
    kept, less = (
        saved_mib(lambda r=r: Fused(engine, r)(x, output, experts), experts.parameters())
        for r in (False, True)
    )
    gate_up = 512 * 2 * 64 * 4 / 2**20
    assert kept - less == pytest.approx(gate_up, rel=0.02)
    with torch.no_grad():  # nothing at all is kept where no gradient is wanted
        assert saved_mib(lambda: Fused(engine)(x, output, experts), experts.parameters()) == 0


def test_other_experts_are_recomputed_too() -> None:
    class Doubled(SwiGLU):
        calls = 0

        def forward(self, *args: Any) -> Tensor:
            self.calls += 1
            return 2 * super().forward(*args)

    output = replace(RECORDS["top 2"], combine_weights=RECORDS["top 2"].combine_weights.float())
    experts, x = Doubled(8, 12, EXPERTS), torch.randn(TOKENS, 8, requires_grad=True)
    y = Fused(recompute=True)(x, output, experts)
    torch.testing.assert_close(y, Autograd()(x, output, experts))  # its own forward, not ours
    calls = experts.calls
    y.sum().backward()
    assert experts.calls == calls + 1
    with pytest.raises(ValueError, match=r"engine='blocks'.*Doubled.*dispatch=auto"):
        Fused("blocks")(x, output, experts)


def test_a_hook_on_the_experts_sees_their_call() -> None:
    output = replace(RECORDS["top 2"], combine_weights=RECORDS["top 2"].combine_weights.float())
    experts, seen = SwiGLU(8, 12, EXPERTS), []
    assert experts.swiglu_weights is not None
    with experts.register_forward_hook(lambda *args: seen.append(len(args[1][0]))):
        Fused()(torch.randn(TOKENS, 8), output, experts)
    assert seen == [2 * TOKENS]


def test_second_derivatives_are_refused_and_not_wrong() -> None:
    output = random_record(5, EXPERTS, 2)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = Fused()(x, output, SwiGLU(4, 3, EXPERTS).double())
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("shape", "autocast", "expected"),
    [
        ((4096, 256, 256, 16, 2), False, ("blocks", torch.float32)),
        ((1024, 128, 128, 64, 8), False, ("grouped", torch.float32)),
        ((4096, 256, 256, 16, 2), True, ("grouped", torch.bfloat16)),
        ((256, 64, 128, 8, 2), True, ("grouped", torch.float32)),
        ((256, 63, 128, 8, 2), False, ("blocks", torch.float32)),
    ],
)
def test_the_choice(shape: tuple[int, ...], autocast: bool, expected: tuple[str, Any]) -> None:
    tokens, d_model, d_ff, num_experts, top_k = shape
    x = torch.empty(tokens, d_model, device="cpu")
    weights = torch.empty(num_experts, 2 * d_ff, d_model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert plan(x, weights, tokens * top_k) == expected
    on_gpu = plan(x.to("meta"), weights.to("meta"), tokens * top_k)  # any device but a CPU
    assert on_gpu == ("grouped" if d_model % 4 == 0 else None, torch.float32)


def test_what_an_engine_refuses() -> None:
    x, weights = torch.empty(8, 6), torch.empty(4, 10, 6)
    with pytest.raises(ValueError, match=r"engine='grouped'.*16 bytes.*d_model=6 and d_ff=5"):
        plan(x, weights, 16, "grouped")
    with pytest.raises(ValueError, match=r"engine='grouped'.*float64"):
        plan(x.double(), weights.double(), 16, "grouped")
    with pytest.raises(ValueError, match=r"engine='blocks'.*CPU.*meta"):
        plan(x.to("meta"), weights, 16, "blocks")
    with pytest.raises(ValueError, match=r"torch.float32 and experts torch.bfloat16"):
        plan(x, weights.bfloat16(), 16)
    with pytest.raises(ValueError, match=r"engine='fast'.*'auto', 'blocks', 'grouped'"):
        Fused("fast")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=20), st.integers(1, 100))
def test_blocks_hold_every_row_once(counts: list[int], block_rows: int) -> None:
    blocks = cut(counts, block_rows)
    rows = [(e, n, b.first) for b in blocks for e, n in zip(b.experts, b.sizes, strict=True)]
    found = dict.fromkeys(range(len(counts)), 0)
    for expert, size, first in rows:
        assert first == (found[expert] == 0)
        found[expert] += size
    assert [e for e, _, _ in rows] == sorted(e for e, _, _ in rows)
    assert list(found.values()) == counts
    assert all(0 < sum(block.sizes) <= max(block_rows * 3 // 2, 1) for block in blocks)


def test_blocks_by_hand() -> None:
    assert cut([0, 30, 0, 40, 200, 10], 100) == [
        Block([1, 3], [30, 40]),
        Block([4], [100]),
        Block([4], [100], first=False),
        Block([5], [10]),
    ]


def test_buffers_are_kept_and_change_nothing_that_was_given_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "BLOCKS_FROM", 0)
    output = replace(RECORDS["top 2"], combine_weights=RECORDS["top 2"].combine_weights.float())
    first, second = SwiGLU(8, 12, EXPERTS), SwiGLU(8, 12, EXPERTS)
    x = torch.randn(TOKENS, 8, requires_grad=True)
    wanted = torch.autograd.grad(Fused()(x, output, first).square().sum(), x)[0]
    y = Fused()(x, output, first)  # then another layer uses the same buffers, forward and backward
    Fused()(x, output, second).square().sum().backward()
    found = torch.autograd.grad(y.square().sum(), x)[0]
    assert torch.equal(found, wanted)


def test_training_after_a_larger_validation() -> None:
    layer, output = SwiGLU(8, 12, EXPERTS), RECORDS["top 2"]
    output = replace(output, combine_weights=output.combine_weights.float())
    x = torch.randn(TOKENS, 8)
    wanted = Loop()(x, output, layer)
    swiglu_blocks._memory.buffers.clear()
    with torch.inference_mode():  # as lightning validates
        torch.testing.assert_close(Fused("blocks")(x, output, layer), wanted)
    y = Fused("blocks")(x, output, layer)
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    assert layer.down_proj.grad is not None
