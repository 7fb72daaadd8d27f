"""The MoE layer as a whole: its two dispatches, its special cases and its symmetries."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.core.routing import RoutingContext
from routerlab.moe.layer import DISPATCHES, DenseSwiGLU, MoE
from routerlab.routers.token_choice import TokenChoice

D, F, E = 8, 6, 4


def layer(dtype: torch.dtype = torch.float64, **changes: Any) -> MoE:
    router = changes.pop("router", partial(TokenChoice, top_k=2, init_std=1.0))
    arguments: dict[str, Any] = {"num_experts": E, "d_ff": F} | changes
    return MoE(D, router=router, **arguments).to(dtype)


def values_and_gradients(moe: MoE, x: Tensor, context: RoutingContext | None) -> dict[str, Tensor]:
    moe.zero_grad()
    x = x.clone().requires_grad_()
    y, output = moe(x, context)
    (y.cos().sum() + output.router_probs.square().sum()).backward()
    gradients = {name: p.grad.clone() for name, p in moe.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["plain", "padding", "capacity", "one token", "skewed", "switch"])
def test_autograd_equals_loop(case: str, dtype: torch.dtype) -> None:
    router = partial(TokenChoice, top_k=2, init_std=1.0)
    shape, context = (2, 5, D), None
    if case == "padding":
        context = RoutingContext(2, 5, valid=torch.arange(10) % 4 > 0)
    if case == "capacity":
        router = partial(router, capacity_factor=0.6)
    if case == "one token":
        shape = (1, 1, D)
    if case == "switch":
        router = partial(TokenChoice, top_k=1, normalize_weights=False, init_std=1.0)
    moe = layer(dtype, router=router, num_shared_experts=1)
    x = torch.randn(shape, dtype=dtype)
    if case == "skewed":  # every token is nearly the same: two experts do all the work
        x = x * 1e-3 + 1
    results = []
    for name in ("autograd", "loop"):
        moe.dispatch = DISPATCHES[name]()
        results.append(values_and_gradients(moe, x, context))
    assert results[0]["router.gate.weight"].abs().max() > 1e-6
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


def test_one_expert_is_the_dense_network() -> None:
    router = partial(TokenChoice, top_k=1, normalize_weights=False)
    moe = layer(router=router, num_experts=1)
    dense = DenseSwiGLU(D, F).double()
    dense.gate_up_proj.weight.data = moe.experts.gate_up_proj.data[0]
    dense.down_proj.weight.data = moe.experts.down_proj.data[0]
    x = torch.randn(3, 4, D, dtype=torch.float64)
    torch.testing.assert_close(moe(x)[0], dense(x))  # softmax over one logit is 1


def test_unlimited_capacity_is_dropless() -> None:
    moe = layer()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    y, _ = moe(x)
    moe.router.capacity_factor = float(E)
    limited, output = moe(x)
    assert output.num_dropped == 0
    torch.testing.assert_close(limited, y)


def test_identical_experts_with_weights_that_sum_to_one_are_one_network() -> None:
    moe = layer()
    for weight in moe.experts.parameters():
        weight.data[:] = weight.data[:1].clone()
    x = torch.randn(6, D, dtype=torch.float64)
    one = moe.experts.expert(0, x, torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(moe(x)[0], one)


def test_relabelling_experts_permutes_the_load_and_nothing_else() -> None:
    moe = layer()
    moved, order = copy.deepcopy(moe), torch.tensor([2, 0, 3, 1])
    for parameter in (*moved.experts.parameters(), moved.router.gate.weight):
        parameter.data = parameter.data[order]
    x = torch.randn(9, D, dtype=torch.float64)
    (y, output), (y_moved, output_moved) = moe(x), moved(x)
    torch.testing.assert_close(y_moved, y)
    assert torch.equal(output_moved.tokens_per_expert, output.tokens_per_expert[order])
    torch.testing.assert_close(output_moved.router_probs, output.router_probs[:, order])


def test_permuting_tokens_permutes_outputs() -> None:
    moe, order = layer(num_shared_experts=1), torch.randperm(7)
    x = torch.randn(7, D, dtype=torch.float64)
    torch.testing.assert_close(moe(x[order])[0], moe(x)[0][order])


def test_shared_experts_have_weight_one_and_no_gate() -> None:  # DeepSeekMoE, equation 9
    moe = layer(num_shared_experts=2)
    shared = moe.shared_experts
    assert shared is not None
    # two shared experts of width F are one of width 2F: split it and add
    gate, up = shared.gate_up_proj.weight.chunk(2)
    x = torch.randn(5, D, dtype=torch.float64)
    parts = []
    for rows in (slice(0, F), slice(F, 2 * F)):
        hidden = torch.nn.functional.silu(x @ gate[rows].T) * (x @ up[rows].T)
        parts.append(hidden @ shared.down_proj.weight[:, rows].T)
    y, output = moe(x)
    routed = DISPATCHES["loop"]()(x, output, moe.experts)
    torch.testing.assert_close(y, routed + parts[0] + parts[1])
    assert output.num_experts == E  # not among the routed


def test_padding_reaches_the_shared_experts_only() -> None:
    moe, valid = layer(num_shared_experts=1), torch.tensor([True, False, True])
    x = torch.randn(3, D, dtype=torch.float64)
    y, _ = moe(x, RoutingContext(1, 3, valid=valid))
    torch.testing.assert_close(y[1], moe.shared_experts(x[1]))
    torch.testing.assert_close(y[valid], moe(x)[0][valid])


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_bfloat16_autocast_is_close_to_float32(dispatch: str) -> None:
    moe = layer(torch.float32, d_ff=8, dispatch=dispatch, num_shared_experts=1)
    x = torch.randn(16, D, requires_grad=True)
    exact, plain = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, output = moe(x)
    assert torch.equal(output.expert_indices, plain.expert_indices)
    # bfloat16 keeps 8 bits: 2^-8 = 0.4 % a rounding, a handful of them on values of size 1
    torch.testing.assert_close(y.float(), exact, rtol=0.03, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


def test_double_backward() -> None:
    moe = layer(d_ff=3, dispatch="autograd")
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: moe(x)[0], x)


def test_no_tokens_no_outputs() -> None:
    y, output = layer(num_shared_experts=1)(torch.zeros(0, D, dtype=torch.float64))
    assert y.shape == (0, D)
    assert output.requests_per_expert.tolist() == [0] * E


def test_a_router_object_or_a_way_to_make_one() -> None:
    router = TokenChoice(D, E)
    assert MoE(D, F, E, router).router is router
    made = MoE(D, F, E, partial(TokenChoice, top_k=3)).router
    assert (made.top_k, made.num_experts) == (3, E)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"dispatch='fast'.*autograd.*loop"):
        layer(dispatch="fast")
    with pytest.raises(ValueError, match=r"num_shared_experts=-1: must be 0 or more"):
        layer(num_shared_experts=-1)
    with pytest.raises(ValueError, match=r"router routes to 3 experts, the layer has 4"):
        layer(router=TokenChoice(D, 3))
