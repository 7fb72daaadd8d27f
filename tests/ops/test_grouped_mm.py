"""Grouped products against a loop, in every dtype and at every edge."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from routerlab.ops.grouped_mm import grouped_mm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}
COUNTS = {
    "skewed": [9, 0, 2, 5],
    "all on the last expert": [0, 0, 0, 16],
    "all on the first expert": [16, 0, 0, 0],
    "one token": [0, 1, 0, 0],
    "no token": [0, 0, 0, 0],
}


def reference(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    start, rows = 0, []
    for expert, count in enumerate(counts):
        rows.append(x[start : start + count] @ weight[expert].T)
        start += count
    return torch.cat(rows)


def make(counts: list[int], inner: int, outer: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), inner, generator=generator)
    weight = torch.randn(len(counts), outer, inner, generator=generator) * inner**-0.5
    return [t.to(dtype).requires_grad_() for t in (x, weight)]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inner", "outer"), [(16, 8), (5, 7)])
def test_equals_the_loop(counts: list[int], dtype: torch.dtype, inner: int, outer: int) -> None:
    tolerance = TOLERANCE[dtype]
    results = []
    for function in (reference, lambda x, w, c: grouped_mm(x, w, torch.tensor(c))):
        x, weight = make(counts, inner, outer, dtype)
        y = function(x, weight, counts)
        assert y.dtype == dtype
        (y.float().cos().sum()).backward()
        results.append((y, x.grad, weight.grad))
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    for expert, count in enumerate(counts):
        if count == 0:
            assert not results[1][2][expert].any()  # exactly 0, not uninitialised memory


@pytest.mark.parametrize("inner", [16, 5])
def test_gradient_of_a_plain_sum(inner: int) -> None:
    # y.sum() hands back an expanded gradient (strides 0, 0), which F.grouped_mm refuses
    counts = [3, 0, 2, 1]
    x, weight = make(counts, inner, 8, torch.float32)
    grouped_mm(x, weight, torch.tensor(counts)).sum().backward()
    rows = weight.detach().sum(1).repeat_interleave(torch.tensor(counts), dim=0)
    torch.testing.assert_close(x.grad, rows)  # d sum_c (W x)_c / dx = sum_c W_c


def test_gradcheck() -> None:
    counts = torch.tensor([2, 0, 3])
    x, weight = make([2, 0, 3], 3, 2, torch.float64)
    assert gradcheck(lambda x, w: grouped_mm(x, w, counts), (x, weight))


def test_gradient_need_not_be_asked_of_both_sides() -> None:
    counts = [4, 0, 4, 0]
    x, weight = make(counts, 8, 8, torch.float32)
    grouped_mm(x.detach(), weight, torch.tensor(counts)).square().sum().backward()
    grouped_mm(x, weight.detach(), torch.tensor(counts)).square().sum().backward()
    both = make(counts, 8, 8, torch.float32)
    reference(*both, counts).square().sum().backward()
    torch.testing.assert_close([x.grad, weight.grad], [t.grad for t in both])


@pytest.mark.parametrize("inner", [16, 5])
def test_autocast_multiplies_in_bfloat16(inner: int) -> None:
    counts = [5, 0, 3, 2]
    x, weight = make(counts, inner, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_mm(x, weight, torch.tensor(counts))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    expected = reference(x.detach(), weight.detach(), counts)
    torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
