"""Our RMSNorm computes what torch's does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from routerlab.backbones.rms_norm import RMSNorm

Change = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, Change] = {
    "whole": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "a column slice": lambda x: x[..., 1:],
    "one row": lambda x: x[0, 0],
    "no rows": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_torch(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(3, 4, 9, dtype=dtype)).detach()
    grad = torch.randn(x.shape, dtype=dtype)
    theirs = nn.RMSNorm(x.shape[-1], eps=1e-3, dtype=dtype)
    nn.init.normal_(theirs.weight)
    ours = RMSNorm(x.shape[-1], eps=1e-3, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    found = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(grad)
        found.append((y, leaf.grad, norm.weight.grad))
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right)


def test_gradients_are_those_of_finite_differences() -> None:
    norm = RMSNorm(5, eps=1e-2, dtype=torch.float64)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradcheck(lambda weight: _with(norm, x.detach(), weight), norm.weight)


def _with(norm: RMSNorm, x: Tensor, weight: Tensor) -> Tensor:
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_left_to_torch(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    ours, theirs = RMSNorm(6, eps=1e-3, dtype=dtype), nn.RMSNorm(6, eps=1e-3, dtype=dtype)
    assert torch.equal(ours(x), theirs(x))
