"""Kernels of other packages: how they are proved, what they refuse, and those that are here."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from routerlab.analysis.flops import forward_flops
from routerlab.backbones.decoder import Decoder
from routerlab.dispatch import kernels
from routerlab.dispatch.kernels import BACKENDS, Kernels
from routerlab.dispatch.loop import Loop
from routerlab.experts.swiglu import SwiGLU
from routerlab.ops.kernel_proof import TOLERANCE, Kind, differences
from routerlab.routers.token_choice import TokenChoice
from tests.helpers.records import ragged_record, random_record

CPU = torch.device("cpu")


def honest(x: Tensor, gate_up: Tensor, down: Tensor, picks: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, weighted by 0 where it was not picked."""
    gate, up = torch.einsum("td,efd->tef", x, gate_up).chunk(2, dim=-1)
    every = torch.einsum("tef,edf->ted", F.silu(gate) * up, down)
    dense = x.new_zeros(len(x), len(gate_up)).scatter(1, picks, weights)
    return torch.einsum("ted,te->td", every, dense)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(6, 16, 8, 2), (1, 8, 8, 1), (3, 5, 7, 3), (64, 8, 16, 4)])
def test_an_honest_kernel_passes(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    assert differences(honest, Kind(dtype, CPU, *sizes)) == []


def _spoiled(how: str) -> Callable[..., Tensor]:
    def kernel(x: Tensor, gate_up: Tensor, down: Tensor, picks: Tensor, weights: Tensor) -> Tensor:
        if how == "halves of gate_up swapped":
            gate_up = gate_up.roll(gate_up.shape[1] // 2, 1)
        if how == "refused":
            raise RuntimeError("no such tile")
        if how == "weights without a gradient":
            weights = weights.detach()
        if how == "a wrong gradient of an expert with few tokens":
            few = int(torch.bincount(picks.flatten(), minlength=len(down))[:-1].argmin())
            down.register_hook(lambda grad: grad.index_fill(0, torch.tensor(few), 0.0))
        if how == "garbage for an expert without tokens":
            gate_up.register_hook(lambda grad: grad.index_fill(0, torch.tensor(len(grad) - 1), 1.0))
        y = honest(x, gate_up, down, picks, weights)
        if how == "the last token forgotten":
            y = y * (torch.arange(len(y)) < len(y) - 1)[:, None]
        if how == "only long inputs":
            y = y * (len(y) > 16)
        if how == "not a number":
            y = y.clone()
            y[0, 0] = torch.nan
        return _Reusing.apply(y) if how == "what was saved is reused" else y

    return kernel


class _Reusing(torch.autograd.Function):
    """The identity, whose backward spoils its second use."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.scale = torch.ones(())
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        result = grads[0] * ctx.scale
        ctx.scale.mul_(2)
        return result


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("halves of gate_up swapped", "output of 160 tokens"),
        ("weights without a gradient", "gradient of combine_weights of 7 tokens by 1.0e+00"),
        ("a wrong gradient of an expert with few tokens", "gradient of down_proj of 160 tokens"),
        ("garbage for an expert without tokens", "gradient of gate_up_proj"),
        ("the last token forgotten", "output of 7 tokens"),
        ("only long inputs", "output of 7 tokens"),
        ("not a number", "output of 160 tokens by nan"),
        ("what was saved is reused", "gradient of x of 160 tokens by 1.0e+00"),
    ],
)
def test_a_wrong_kernel_is_found_out(how: str, named: str) -> None:
    found = differences(_spoiled(how), Kind(torch.float32, CPU, 6, 16, 8, 2))
    assert any(named in line for line in found), found


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A backend ``here`` for this machine; the list holds the number of tokens of each call."""
    calls: list[int] = []

    def kernel(x: Tensor, *others: Tensor) -> Tensor:
        calls.append(len(x))
        return honest(x, *others)

    backend = replace(BACKENDS["liger"], load=lambda: kernel)
    monkeypatch.setitem(kernels.BACKENDS, "here", backend)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # no GPU is asked for
    return calls


def test_equals_the_loop_and_is_proved_once_a_kind(here: list[int]) -> None:
    dispatch, experts = Kernels("here"), SwiGLU(8, 12, 5)
    assert here == []
    for top_k in (2, 2, 3):
        output, results = random_record(9, 5, top_k), []
        for run in (dispatch, Loop()):
            x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
            weights = output.combine_weights.detach().float().requires_grad_()
            y = run(x, replace(output, combine_weights=weights), experts)
            experts.zero_grad()
            y.cos().sum().backward()
            grads = [p.grad.clone() for p in experts.parameters()]
            results.append([y.detach(), x.grad, weights.grad, *grads])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert here == [160, 7, 9, 9, 160, 7, 9]  # proof, use, use; proof of another K, use


def test_is_proved_within_inference_and_checkpointing(here: list[int]) -> None:
    experts, output, x = SwiGLU(8, 12, 5), random_record(9, 5, 2), torch.randn(9, 8)
    output = replace(output, combine_weights=output.combine_weights.float())
    with torch.inference_mode():
        inferred = Kernels("here")(x, output, experts)
    x.requires_grad_()
    y = torch.utils.checkpoint.checkpoint(
        Kernels("here"), x, output, experts, use_reentrant=False, preserve_rng_state=False
    )
    y.sum().backward()
    torch.testing.assert_close(y, inferred)
    assert x.grad is not None
    assert here == [160, 7, 9] * 2 + [9]  # the last is the recomputation


def test_autocast_decides_the_type_and_no_tokens_are_no_error(here: list[int]) -> None:
    experts, output, x = SwiGLU(8, 16, 5), random_record(9, 5, 2), torch.randn(9, 8)
    exact = Loop()(x, output, experts)
    with torch.autocast("cpu", torch.bfloat16):
        y = Kernels("here")(x, output, experts)
    assert y.dtype == torch.float32
    error = (y - exact).detach().abs().max() / exact.detach().abs().max()
    assert 1e-4 < float(error) < 0.03  # bfloat16 it was
    assert Kernels("here")(x[:0], random_record(0, 5, 2), experts).shape == (0, 8)
    assert here == [160, 7, 9, 160, 7]


def test_what_a_kernel_does_not_do_is_refused(
    here: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, output = SwiGLU(8, 12, 5), random_record(8, 5, 2)
    x = torch.randn(8, 8)
    with pytest.raises(ValueError, match="exactly K experts for every token"):
        Kernels("here")(x, ragged_record(8, 5), experts)
    with pytest.raises(ValueError, match="plain SwiGLU experts, not SimpleNamespace"):
        Kernels("here")(x, output, SimpleNamespace())
    with pytest.raises(ValueError, match=r"mixed types torch.bfloat16, torch.float32"):
        Kernels("here")(x.bfloat16(), output, experts)
    with pytest.raises(ValueError, match=r"not in torch.float64; trainer.precision=bf16-mixed"):
        Kernels("here")(x.double(), output, SwiGLU(8, 12, 5).double())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    dispatch = object.__new__(Kernels)
    dispatch.backend = "here"
    with pytest.raises(ValueError, match="needs a CUDA device, and the tokens are on cpu"):
        dispatch(x, output, experts)


def test_the_operations_of_a_kernel_are_counted(here: list[int]) -> None:
    dispatch, ids = Kernels("here"), torch.arange(12).view(2, 6)
    models = [
        Decoder(
            TokenChoice, vocab_size=32, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1,
            d_ff=8, num_experts=4, max_positions=8, dispatch=choice,
        )
        for choice in (dispatch, "autograd")
    ]  # fmt: skip
    assert forward_flops(models[0], ids) == forward_flops(models[1], ids)
    assert here == []
    assert all(block.moe.dispatch is dispatch for block in models[0].layers)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("halves of gate_up swapped", r"is wrong for E=5, D=8, F=12, K=2, torch.float32 on cpu"),
        ("refused", r"fails for E=5, D=8, F=12, K=2, torch.float32 on cpu \(no such tile\)"),
    ],
)
def test_a_failed_proof_ends_the_run(
    here: list[int], monkeypatch: pytest.MonkeyPatch, how: str, message: str
) -> None:
    backend = replace(BACKENDS["liger"], load=lambda: _spoiled(how))
    monkeypatch.setitem(kernels.BACKENDS, "here", backend)
    output = random_record(8, 5, 2)
    with pytest.raises(ValueError, match=f"{message}.*use dispatch=autograd"):
        Kernels("here")(torch.randn(8, 8), output, SwiGLU(8, 12, 5))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"dispatch.backend='fast': must be one of 'liger'"):
        Kernels("fast")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match=r"'liger'.*liger_kernel.*pip install liger-kernel"):
        Kernels("liger")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"'sonicmoe'.*kernels.*nvidia-cutlass-dsl.*Hopper"):
        Kernels("sonicmoe")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"'liger': needs a GPU, and torch sees no CUDA"):
        Kernels("liger")


@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU, or TRITON_INTERPRET=1 LIGER_FUSED_MOE_AUTOTUNE=0; and the packages",
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(8, 32, 64, 2), (3, 20, 12, 1), (6, 33, 65, 6)])
def test_the_packages_that_are_here(
    backend: str, dtype: torch.dtype, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype not in BACKENDS[backend].dtypes or (device == CPU and dtype != torch.float32):
        pytest.skip("not a type of this package, or of Triton's interpreter")
    try:
        dispatch = Kernels(backend)
    except ValueError as error:
        pytest.skip(str(error))
    if device != CPU:  # on a GPU their products of float32 are of 11 bits
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert differences(dispatch._kernel, Kind(dtype, device, *sizes)) == []
