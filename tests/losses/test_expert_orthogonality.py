"""The orthogonality loss by hand, of router rows and of expert outputs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routerlab.core.protocols import AuxLoss, LayerLoss
from routerlab.core.routing import RoutingContext
from routerlab.losses.expert_orthogonality import ExpertOrthogonalityLoss, mean_squared_cosine
from routerlab.moe.layer import MoE
from routerlab.routers.token_choice import TokenChoice


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def moe(num_experts: int = 4, d_model: int = 6, d_ff: int = 5) -> MoE:
    torch.manual_seed(0)
    return MoE(d_model, d_ff, num_experts, TokenChoice(d_model, num_experts, init_std=1.0)).double()


def context(**changes: int) -> RoutingContext:
    return RoutingContext(**({"batch_size": 2, "sequence_length": 3} | changes))


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], 1 / 3),  # ||G - I||_F^2 = 4 * 1/2 = 2, over 6 pairs
        ([[2.0, 0.0], [0.0, 3.0]], 0.0),
        ([[1.0, 2.0], [-2.0, -4.0]], 1.0),  # parallel in the opposite sense
        ([[0.0, 0.0], [1.0, 1.0]], 0.0),
        ([[1.0, 1.0]], 0.0),
    ],
)
def test_value_by_hand(vectors: list[list[float]], expected: float) -> None:
    layer = SimpleNamespace(router=SimpleNamespace(gate=SimpleNamespace(weight=tensor(vectors))))
    value = ExpertOrthogonalityLoss().of_layer(layer)
    assert float(value) == pytest.approx(expected)


def test_cosines_are_averaged_over_probes_before_the_square() -> None:
    # cosines 1 and 0 on two probes: (1/2)^2
    first, second = [[1.0, 0.0], [1.0, 0.0]], [[5.0, 0.0], [0.0, 5.0]]
    assert float(mean_squared_cosine(tensor([first, second]))) == pytest.approx(0.25)


def test_outputs_against_a_loop_over_experts() -> None:
    layer = moe()
    value = ExpertOrthogonalityLoss(of="outputs", num_probes=7).of_layer(layer, context())
    probes = torch.randn(7, 6, generator=context().step_generator(torch.device("cpu")))
    probes = (probes / probes.square().mean(-1, keepdim=True).sqrt()).double()
    ones = torch.ones(7, dtype=torch.float64)
    outputs = [layer.experts.expert(i, probes, ones) for i in range(4)]
    total = sum(
        torch.cosine_similarity(outputs[i], outputs[j], dim=-1).mean() ** 2
        for i in range(4)
        for j in range(4)
        if i != j
    )
    torch.testing.assert_close(value, total / 12)


def test_copies_of_one_expert_score_one() -> None:
    layer = moe()
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight))
    value = ExpertOrthogonalityLoss(of="outputs").of_layer(layer, context())
    assert value.item() == pytest.approx(1)


def test_gradient_by_finite_differences() -> None:
    vectors = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mean_squared_cosine, vectors)


@pytest.mark.parametrize(
    ("of", "names"),
    [
        ("router", {"router.gate.weight"}),
        ("outputs", {"experts.gate_up_proj", "experts.down_proj"}),
    ],
)
def test_descent_parts_them_and_moves_nothing_else(of: str, names: set[str]) -> None:
    layer, loss = moe(), ExpertOrthogonalityLoss(of=of)
    before = loss.of_layer(layer, context())
    before.backward()
    moved = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert moved == names
    with torch.no_grad():
        for weight in layer.parameters():
            if weight.grad is not None:
                weight -= 0.5 * weight.grad
    assert loss.of_layer(layer, context()).item() < 0.99 * before.item()


def test_zero_weights_have_a_finite_gradient() -> None:
    for of in ("router", "outputs"):
        layer = moe()
        with torch.no_grad():
            layer.router.gate.weight.zero_()
            layer.experts.down_proj.zero_()
        value = ExpertOrthogonalityLoss(of=of).of_layer(layer, context())
        value.backward()
        assert value.item() == 0
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        assert all(grad.isfinite().all() for grad in grads)


def test_probes_are_of_the_step_and_the_layer() -> None:
    layer, loss = moe(), ExpertOrthogonalityLoss(of="outputs", num_probes=3)
    value = loss.of_layer(layer, context(step_seed=1))
    other_batch = context(step_seed=1, seed=7, batch_size=9)
    assert torch.equal(loss.of_layer(layer, other_batch), value)
    assert not torch.equal(loss.of_layer(layer, context(step_seed=2)), value)
    assert not torch.equal(loss.of_layer(layer, context(step_seed=1, layer=1)), value)


@pytest.mark.parametrize("of", ["router", "outputs"])
def test_autocast_is_off(of: str) -> None:
    layer, loss = moe().float(), ExpertOrthogonalityLoss(of=of)
    expected = loss.of_layer(layer, context())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss.of_layer(layer, context()), expected)


def test_it_is_a_loss_of_layers() -> None:
    assert isinstance(ExpertOrthogonalityLoss(), LayerLoss)
    assert not isinstance(ExpertOrthogonalityLoss(), AuxLoss)


def test_mistakes_are_named() -> None:
    layer, other = moe(), nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"of='outputs' draws its probes.*pass a RoutingContext"):
        ExpertOrthogonalityLoss(of="outputs").of_layer(layer)
    with pytest.raises(ValueError, match=r"needs router\.gate\.weight; Linear has none"):
        ExpertOrthogonalityLoss().of_layer(SimpleNamespace(router=other))
    lone = SimpleNamespace(experts=other)
    with pytest.raises(ValueError, match=r"needs experts\.gate_up_proj; Linear has none"):
        ExpertOrthogonalityLoss(of="outputs").of_layer(lone, context())
    with pytest.raises(ValueError, match=r"of='weights': must be one of 'router', 'outputs'"):
        ExpertOrthogonalityLoss(of="weights")
    with pytest.raises(ValueError, match=r"num_probes=0: must be at least 1"):
        ExpertOrthogonalityLoss(num_probes=0)
    with pytest.raises(ValueError, match=r"weight=-0.1: must be at least 0"):
        ExpertOrthogonalityLoss(weight=-0.1)
