"""SwiGLU experts: the grouped form, the readable form, and the formula."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from routerlab.core.protocols import Experts
from routerlab.experts.swiglu import SwiGLU
from routerlab.ops import swiglu as ops_swiglu

COUNTS = torch.tensor([3, 0, 2])


def formula(experts: SwiGLU, index: int, x: Tensor) -> Tensor:
    """W_down (silu(W_gate x) * W_up x), gate rows first."""
    gate, up = experts.gate_up_proj[index].chunk(2)
    return (F.silu(x @ gate.T) * (x @ up.T)) @ experts.down_proj[index].T


@pytest.fixture(params=[None, 8], ids=["in one piece", "in blocks"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one or two rows, the last one shorter, where they would be of thousands."""
    if request.param is not None:
        monkeypatch.setattr(ops_swiglu, "_BLOCK_SIZE", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_grouped_equals_readable_equals_formula(dtype: torch.dtype) -> None:
    experts = SwiGLU(8, 12, 3).to(dtype)
    x, weights = torch.randn(5, 8, dtype=dtype), torch.rand(5, dtype=dtype)
    y = experts(x, COUNTS, weights)
    start = 0
    for index, count in enumerate(COUNTS.tolist()):
        rows = slice(start, start + count)
        start += count
        one = experts.expert(index, x[rows], weights[rows])
        torch.testing.assert_close(y[rows], one)
        torch.testing.assert_close(one, formula(experts, index, x[rows]) * weights[rows, None])


@pytest.mark.usefixtures("pieces")
def test_gradient_of_the_combine_weights_is_output_dot_gradient() -> None:
    # weighting the hidden row must give the same d/dw as weighting the output row
    experts = SwiGLU(4, 6, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(5, 4, dtype=torch.float64)
    experts(x, COUNTS, weights).backward(seed)
    outputs = experts(x, COUNTS, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(weights.grad, (outputs * seed).sum(-1))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("with_weights", [False, True])
def test_first_and_second_gradients(with_weights: bool) -> None:
    experts = SwiGLU(3, 2, 3).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64, requires_grad=with_weights)
    inputs = (x, weights, *experts.parameters())

    def function(x: Tensor, weights: Tensor, *_: Tensor) -> Tensor:
        return experts(x, COUNTS, weights)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_input_and_experts_may_be_frozen() -> None:
    # a router trained alone: only the combine weights want a gradient
    experts = SwiGLU(4, 6, 3).double().requires_grad_(False)
    x, weights = torch.randn(5, 4, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    weights.requires_grad_()
    experts(x, COUNTS, weights).sum().backward()
    outputs = experts(x, COUNTS, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(weights.grad, outputs.sum(-1))


def test_shapes_are_those_of_transformers() -> None:
    experts = SwiGLU(d_model=8, d_ff=12, num_experts=3)
    assert isinstance(experts, Experts)
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    assert shapes == {"gate_up_proj": (3, 24, 8), "down_proj": (3, 8, 12)}


def test_initial_outputs_keep_the_size_of_the_input() -> None:
    # unit-variance x: W_gate x and W_up x have variance 1, E[silu(z)^2] = 0.3557 for z ~ N(0, 1)
    # (numerical integral), and W_down of variance 1/F over F hidden units keeps it
    experts = SwiGLU(64, 256, 2)
    y = experts(torch.randn(500, 64), torch.tensor([250, 250]), torch.ones(500))
    assert float(y.detach().square().mean()) == pytest.approx(0.3557, rel=0.1)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"d_ff=0: must be at least 1"):
        SwiGLU(4, 0, 2)
