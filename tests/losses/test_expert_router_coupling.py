"""The expert-router coupling loss by hand, its noise, its gradient and its probe."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routerlab.core.protocols import AuxLoss, LayerLoss
from routerlab.core.routing import RoutingContext
from routerlab.losses import expert_router_coupling as erc
from routerlab.losses.expert_router_coupling import (
    ExpertRouterCouplingLoss,
    coupling_loss,
    coupling_matrix,
    excess,
    perturbation_radius,
    perturbed,
)
from routerlab.moe.layer import MoE
from routerlab.routers.token_choice import TokenChoice

IDENTITY = [[1.0, 0.0], [0.0, 1.0]]
ROWS = [[1.0, 0.0], [0.6, 0.8]]
GATES = [[[1.0, 0.0], [0.0, 0.5]], [[0.5, 0.0], [0.0, 2.0]]]  # diag(1, .5), diag(.5, 2)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def layer_of(rows: Any, gates: Any) -> Any:
    """What the loss reads of a layer; the up halves are nonsense on purpose."""
    gates = tensor(gates)
    gate_up = torch.cat([gates, torch.full_like(gates, 1e3)], dim=1)
    gate = SimpleNamespace(weight=tensor(rows).requires_grad_())
    return SimpleNamespace(
        router=SimpleNamespace(gate=gate),
        experts=SimpleNamespace(gate_up_proj=gate_up.requires_grad_()),
    )


def moe(num_experts: int = 4, d_model: int = 6, d_ff: int = 5) -> MoE:
    torch.manual_seed(0)
    return MoE(d_model, d_ff, num_experts, TokenChoice(d_model, num_experts, init_std=1.0)).double()


def context(**changes: int) -> RoutingContext:
    return RoutingContext(**({"batch_size": 2, "sequence_length": 3} | changes))


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, 0.0), (0.5, 0.25), (0.0, 0.75)])
def test_a_layer_by_hand(alpha: float, expected: float) -> None:
    gates = [[[1.0, 1.0]], [[0.5, 1.0]]]  # [F=1, D=2] each
    matrix = coupling_matrix(tensor(IDENTITY), tensor(gates))
    torch.testing.assert_close(matrix, tensor([[1.0, 0.5], [1.0, 1.0]]))
    loss = ExpertRouterCouplingLoss(alpha=alpha, noise=False)
    assert loss.of_layer(layer_of(IDENTITY, gates)).item() == pytest.approx(expected)


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, 8 / 9), (0.5, 11 / 9)])
def test_three_experts_by_hand(alpha: float, expected: float) -> None:
    # alpha 1: by rows (3 - 2) + (4 - 1), by columns (4 - 2) + (3 - 1), over 9
    # alpha .5: (3 - 1) + (4 - .5), and (4 - 1) + (3 - .5), over 9
    matrix = tensor([[2.0, 1.0, 3.0], [1.0, 2.0, 0.5], [0.0, 4.0, 1.0]])
    assert float(coupling_loss(matrix, alpha)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.0, 0.610555), (0.25, 0.282070), (0.5, 0.055278), (1.0, 0.0)]
)
def test_wider_experts_by_hand(alpha: float, expected: float) -> None:
    matrix = coupling_matrix(tensor(ROWS), tensor(GATES))
    expected_matrix = tensor([[1.0, 0.5], [0.72111, 1.62788]])  # token by expert: not symmetric
    torch.testing.assert_close(matrix, expected_matrix, atol=1e-5, rtol=0)
    loss = ExpertRouterCouplingLoss(alpha=alpha, noise=False)
    assert loss.of_layer(layer_of(ROWS, GATES)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (IDENTITY, [0.70711, 0.70711]),
        (ROWS, [0.44721, 0.44721]),
        ([[3.0, 4.0], [0.0, 5.0], [3.0, -4.0]], [0.31623, 0.31623, 0.8]),
        ([[0.1, 0.0], [-1.0, 0.0]], [5.5, 0.55]),
        ([[1.0, 2.0], [1.0, 2.0], [0.0, 9.0]], [0.0, 0.0, 0.39284]),  # sqrt(50) / 18
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
    ],
)
def test_radius(rows: list[list[float]], expected: list[float]) -> None:
    radius = perturbation_radius(tensor(rows))
    torch.testing.assert_close(radius, tensor(expected), atol=1e-5, rtol=0)


def test_noise_stays_in_the_own_cell_and_fills_its_range() -> None:
    rows = torch.randn(6, 400, dtype=torch.float64)
    rows[1] = rows[0]  # no radius, no noise
    rows[2] *= 0.01  # a radius far above 1
    noisy = perturbed(rows, torch.Generator().manual_seed(0))
    distances = torch.cdist(rows, rows).fill_diagonal_(torch.inf).amin(1)
    assert (((noisy - rows).norm(dim=1)) <= distances / 2).all()
    assert torch.equal(noisy[:2], rows[:2])
    factor = noisy / rows
    assert (factor[2] > 0).all()
    radius = perturbation_radius(rows).clamp(max=1)
    for i in range(2, 6):
        assert factor[i].min() < 1 - 0.9 * radius[i]
        assert factor[i].max() > 1 + 0.9 * radius[i]
        assert abs(factor[i].mean() - 1) < 0.15


def test_noise_is_of_the_step_and_the_layer_and_of_nothing_else() -> None:
    layer, loss = moe(), ExpertRouterCouplingLoss(alpha=0.5)
    value = loss.of_layer(layer, context(step_seed=1))
    other_batch = context(step_seed=1, seed=7, batch_size=9, sequence_length=50)
    assert torch.equal(loss.of_layer(layer, other_batch), value)
    for changes in ({"step_seed": 2}, {"step_seed": 1, "layer": 1}):
        assert not torch.equal(loss.of_layer(layer, context(**changes)), value)
    clean = ExpertRouterCouplingLoss(alpha=0.5, noise=False)
    assert not torch.equal(clean.of_layer(layer), value)
    with pytest.raises(ValueError, match=r"noise=true.*pass a RoutingContext"):
        loss.of_layer(layer)


def test_shrinks_as_alpha_grows() -> None:
    matrix = torch.rand(5, 5, dtype=torch.float64)
    values = [float(coupling_loss(matrix, alpha)) for alpha in (0.0, 0.3, 0.7, 1.0, 2.0, 9.0)]
    assert values == sorted(values, reverse=True)
    off_diagonal = float(matrix.sum() - matrix.trace())
    assert values[0] == pytest.approx(2 / 25 * off_diagonal)
    assert values[0] > values[3] > 0


def test_terms_are_told_apart() -> None:
    # at [0, 1]: M_01 = 3 exceeds M_00 = 1 (token 0 excites expert 1 more) by 2, M_11 = 2 by 1
    expert, router = excess(tensor([[1.0, 3.0], [0.0, 2.0]]), alpha=1.0)
    assert expert.tolist() == [[0, 2], [0, 0]]
    assert router.tolist() == [[0, 1], [0, 0]]


def test_scales_with_the_weights_and_not_with_the_order_of_experts() -> None:
    layer, loss = moe(), ExpertRouterCouplingLoss(alpha=0.5, noise=False)
    value = loss.of_layer(layer).detach()
    with torch.no_grad():
        order = torch.tensor([2, 0, 3, 1])
        layer.router.gate.weight.copy_(layer.router.gate.weight[order])
        layer.experts.gate_up_proj.copy_(layer.experts.gate_up_proj[order])
        torch.testing.assert_close(loss.of_layer(layer), value)
        layer.experts.gate_up_proj *= 0.5
        torch.testing.assert_close(loss.of_layer(layer), value / 2)


def test_gradient_by_finite_differences() -> None:
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda r, g: coupling_loss(coupling_matrix(r, g), 0.5), (rows, gates)
    )


def test_gradient_reaches_rows_and_gate_halves_and_nothing_else() -> None:
    layer = moe()
    ExpertRouterCouplingLoss(alpha=0.5).of_layer(layer, context()).backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert set(grads) == {"router.gate.weight", "experts.gate_up_proj"}
    assert grads["router.gate.weight"].abs().amax(1).min() > 0
    gate, up = grads["experts.gate_up_proj"].chunk(2, dim=1)
    assert gate.abs().amax((1, 2)).min() > 0
    assert not up.any()


def test_the_radius_is_a_constant_of_the_gradient() -> None:
    # one draw of the noise, times rows: the gradient is that of rows * factor with factor fixed
    layer, loss = moe(), ExpertRouterCouplingLoss(alpha=0.5)
    loss.of_layer(layer, context()).backward()
    rows = layer.router.gate.weight.detach().clone().requires_grad_()
    factor = (perturbed(rows, context().step_generator(rows.device)) / rows).detach()
    gates = layer.experts.gate_up_proj.detach()[:, :5]
    coupling_loss(coupling_matrix(rows * factor, gates), 0.5).backward()
    torch.testing.assert_close(layer.router.gate.weight.grad, rows.grad)


def test_zero_weights_have_a_finite_gradient() -> None:
    layer = layer_of([[0.0, 0.0]] * 2, GATES)  # a router that starts at zero
    value = ExpertRouterCouplingLoss(alpha=0.5).of_layer(layer, context())
    value.backward()
    assert value.item() == 0
    assert layer.router.gate.weight.grad.isfinite().all()
    assert layer.experts.gate_up_proj.grad.isfinite().all()


def test_one_expert_has_nobody_to_be_told_from() -> None:
    layer = layer_of([[1.0, 2.0]], GATES[:1])
    assert ExpertRouterCouplingLoss(alpha=0.0).of_layer(layer, context()).item() == 0


def test_chunks_change_neither_value_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (erc._MAX_ACTIVATIONS, 2 * 7 * 5, 1):  # all at once, two experts, one
        monkeypatch.setattr(erc, "_MAX_ACTIVATIONS", limit)
        layer = moe(num_experts=7)
        value = ExpertRouterCouplingLoss(alpha=0.5).of_layer(layer, context())
        value.backward()
        grads = [layer.router.gate.weight.grad, layer.experts.gate_up_proj.grad]
        results.append([value.detach(), *grads])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_the_layer_itself_does_not_feel_it() -> None:
    layer, x = moe(), torch.randn(9, 6, dtype=torch.float64)
    before, record = layer(x)
    ExpertRouterCouplingLoss(alpha=0.5).of_layer(layer, context()).backward()
    after, again = layer(x)
    assert torch.equal(before, after)
    assert torch.equal(record.router_logits, again.router_logits)
    assert torch.equal(record.expert_indices, again.expert_indices)


def test_autocast_and_half_precision_weights_are_computed_in_float32() -> None:
    layer, loss = moe().float(), ExpertRouterCouplingLoss(alpha=0.5)
    expected = loss.of_layer(layer, context())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss.of_layer(layer, context()), expected)
    value = loss.of_layer(layer.bfloat16(), context())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=0.05)


def test_probe_by_hand() -> None:
    # M = [[1, .5], [.72111, 1.62788]], alpha .4. Tokens: .5 > .4 and .72111 > .65115: both;
    # experts: .5 < .65115 and .72111 > .4: one. Ratios .5 and .44298.
    layer = layer_of(ROWS, GATES)
    found = ExpertRouterCouplingLoss(alpha=0.4).probe(layer)
    values = {name: float(value) for name, value in found.items()}
    expected = {
        "radius_mean": 0.44721,
        "radius_min": 0.44721,
        "expert_violations": 1.0,
        "router_violations": 0.5,
        "ratio": 0.47149,
    }
    assert values == pytest.approx(expected, abs=1e-5)
    assert not any(value.requires_grad for value in found.values())
    with pytest.raises(ValueError, match="at least 2 experts"):
        ExpertRouterCouplingLoss().probe(layer_of([[1.0, 2.0]], GATES[:1]))


def test_it_is_a_loss_of_layers() -> None:
    loss = ExpertRouterCouplingLoss()
    assert isinstance(loss, LayerLoss)
    assert not isinstance(loss, AuxLoss)


def test_layers_without_the_weights_are_refused_by_name() -> None:
    layer, loss = moe(), ExpertRouterCouplingLoss(noise=False)
    other = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"router\.gate\.weight.*router \(Linear\) has none"):
        loss.of_layer(SimpleNamespace(router=other, experts=layer.experts))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj.*experts \(Linear\) has none"):
        loss.of_layer(SimpleNamespace(router=layer.router, experts=other))
    wider = SimpleNamespace(router=TokenChoice(6, 5).double(), experts=layer.experts)
    with pytest.raises(ValueError, match=r"\(5, 6\) does not fit .*\(4, 10, 6\)"):
        loss.of_layer(wider)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"alpha=-0.5: must be at least 0"):
        ExpertRouterCouplingLoss(alpha=-0.5)
    with pytest.raises(ValueError, match=r"weight=-1.0: must be at least 0"):
        ExpertRouterCouplingLoss(weight=-1.0)
