"""The fast path equals the readable one, in values and all gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from routerlab.core.protocols import Dispatch
from routerlab.core.routing import RouterOutput
from routerlab.dispatch.autograd import Autograd
from routerlab.dispatch.fused import Fused
from routerlab.dispatch.loop import Loop
from routerlab.experts.swiglu import SwiGLU
from tests.helpers.records import ex_a, ragged_record, random_record, record

EXPERTS = 5
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
_UNIFORM = torch.full((8, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
RECORDS: dict[str, RouterOutput] = {
    "top 2": random_record(8, EXPERTS, 2),
    "top 1": random_record(8, EXPERTS, 1),
    "all experts": random_record(8, EXPERTS, EXPERTS),
    "one token": random_record(1, EXPERTS, 2),
    "one busy expert": record(_UNIFORM, torch.full((8, 1), EXPERTS - 1)),
    "dead experts": record(_UNIFORM, torch.tensor([[1, 3]]).expand(8, 2)),
    "padding": random_record(8, EXPERTS, 2, valid=torch.arange(8) % 3 > 0),
    "dropped": record(
        _UNIFORM, torch.tensor([[0, 1]]).expand(8, 2), kept=torch.arange(16).view(8, 2) % 5 < 3
    ),
    "ragged": ragged_record(8, EXPERTS),
    "nothing": random_record(8, EXPERTS, 2, valid=torch.zeros(8, dtype=torch.bool)),
}


DISPATCHES = [
    Autograd(),
    Loop(),
    Fused(),
    Fused(recompute=True),
    Fused("blocks"),
    Fused("blocks", recompute=True),
]


def reference(x: Tensor, output: RouterOutput, experts: SwiGLU) -> Tensor:
    """Assignment by assignment."""
    rows = [0 * row for row in x]
    for n, token in enumerate(output.token_indices.tolist()):
        index, weight = int(output.expert_indices[n]), output.combine_weights[n : n + 1]
        one = experts.expert(index, x[token : token + 1], torch.ones_like(weight))
        rows[token] = rows[token] + one[0] * weight
    return torch.stack(rows)


def results(
    dispatch: Dispatch, output: RouterOutput, dtype: torch.dtype, d_model: int, d_ff: int
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    experts = SwiGLU(d_model, d_ff, EXPERTS).to(dtype)
    x = torch.randn(len(output.router_logits), d_model).to(dtype).requires_grad_()
    weights = output.combine_weights.detach().to(dtype).requires_grad_()
    y = dispatch(x, replace(output, combine_weights=weights), experts)
    assert y.shape == x.shape
    assert y.dtype == dtype
    (y.cos().sum() + y.square().sum()).backward()
    named = {name: p.grad for name, p in experts.named_parameters()}
    return {"y": y, "x": x.grad, "weights": weights.grad} | named


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", RECORDS)
def test_equals_the_definition(dispatch: Dispatch, dtype: torch.dtype, name: str) -> None:
    for d_model, d_ff in ((8, 4), (5, 3)):  # widths that F.grouped_mm takes, and refuses
        got = results(dispatch, RECORDS[name], dtype, d_model, d_ff)
        expected = results(reference, RECORDS[name], dtype, d_model, d_ff)
        for key, value in got.items():
            wanted = expected[key]
            wanted = torch.zeros_like(value) if wanted is None else wanted
            torch.testing.assert_close(
                value, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=key
            )


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("d_model", [8, 5])
def test_a_dead_expert_has_a_gradient_of_zero(dispatch: Dispatch, d_model: int) -> None:
    got = results(dispatch, RECORDS["dead experts"], torch.float32, d_model, 4)
    for name in ("gate_up_proj", "down_proj"):
        assert got[name] is not None
        assert not got[name][[0, 2, 4]].any()
        assert got[name][[1, 3]].any()


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_tokens_without_an_expert_get_zero(dispatch: Dispatch) -> None:
    valid = torch.tensor([True, False, True, False])
    output = random_record(4, EXPERTS, 2, valid=valid)
    x = torch.randn(4, 6, dtype=torch.float64)
    x[1] = torch.nan  # padding may hold anything
    y = dispatch(x, output, SwiGLU(6, 4, EXPERTS).double())
    assert not y[~valid].any()
    assert y[valid].isfinite().all()


def test_identity_experts_and_weights_that_sum_to_one_give_the_input_back() -> None:
    class Identity:
        num_experts = 4

        def __call__(self, x: Tensor, tokens_per_expert: Tensor, combine_weights: Tensor) -> Tensor:
            return x * combine_weights[:, None]

        def expert(self, index: int, x: Tensor, combine_weights: Tensor) -> Tensor:
            return x * combine_weights[:, None]

    output = ex_a()
    pairs = output.combine_weights.view(4, 2)
    output = replace(output, combine_weights=(pairs / pairs.sum(1, keepdim=True)).flatten())
    x = torch.randn(4, 3, dtype=torch.float64)
    for dispatch in (Autograd(), Loop(), Fused()):
        torch.testing.assert_close(dispatch(x, output, Identity()), x)


def test_order_of_assignments_does_not_matter() -> None:
    output = replace(ragged_record(8, EXPERTS), top_k=None)
    order = torch.randperm(len(output.token_indices))
    moved = replace(
        output,
        token_indices=output.token_indices[order],
        expert_indices=output.expert_indices[order],
        combine_weights=output.combine_weights[order],
    )
    x, experts = torch.randn(8, 6, dtype=torch.float64), SwiGLU(6, 4, EXPERTS).double()
    torch.testing.assert_close(Autograd()(x, moved, experts), Autograd()(x, output, experts))
