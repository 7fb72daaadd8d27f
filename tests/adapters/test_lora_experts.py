"""LoRA experts of a linear against loops over tokens and experts, and their dropout."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from routerlab.adapters import MixtureOfLoraConfig
from routerlab.adapters.experts import Dropout
from routerlab.core.routing import RoutingContext
from tests.helpers.language_models import VOCAB, tiny_llama
from tests.helpers.mixtures import (
    SOFT,
    Told,
    call,
    layers_of,
    lone_linear,
    stir,
    uneven_weights,
)

D_IN, D_OUT, EXPERTS, RANK, TOKENS = 6, 5, 4, 3, 9
FORMS = ("lora", "shared_a")


def config(experts: str = "lora", **changes: Any) -> MixtureOfLoraConfig:
    sizes = {"num_experts": EXPERTS, "r": RANK, "lora_alpha": 2.0, "router": SOFT}
    return MixtureOfLoraConfig(experts=experts, **(sizes | changes))


def tokens(num: int = TOKENS) -> Tensor:
    return torch.randn(num, D_IN, dtype=torch.float64, requires_grad=True)


def naive(layer: Any, x: Tensor, weights: Tensor) -> Tensor:
    """W x + s sum_i w_i B_i A_i x, token by token and expert by expert."""
    experts, rows = layer.experts, []
    for row, shares in zip(x, weights * (weights != 0), strict=True):
        y = layer.base_layer(row)
        for i in range(weights.shape[1]):
            a = experts.lora_A if experts.lora_A.ndim == 2 else experts.lora_A[i]
            y = y + experts.scaling * shares[i] * (experts.lora_B[i] @ (a @ row))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"num_experts": 1}])
def test_values_and_gradients(form: str, changes: dict[str, Any]) -> None:
    made = config(form, **changes)
    weights, x = uneven_weights(TOKENS, made.num_experts), tokens()
    layer = lone_linear(made, D_IN, D_OUT, Told(weights))
    assert layer.experts.scaling == pytest.approx(2 / (3**0.5 if made.use_rslora else 3))
    inputs = (x, weights, layer.experts.lora_A, layer.experts.lora_B)
    back = torch.randn(TOKENS, D_OUT, dtype=torch.float64)
    got, expected = call(layer, x), naive(layer, x, weights)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, back),
        torch.autograd.grad(expected, inputs, back),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_token_without_experts_keeps_the_frozen_linear(form: str) -> None:
    x = tokens()
    layer = lone_linear(config(form), D_IN, D_OUT, Told(uneven_weights(TOKENS, EXPERTS)))
    y, frozen = call(layer, x), layer.base_layer(x)
    assert torch.equal(y[0], frozen[0])
    assert not torch.allclose(y[1], frozen[1])


def test_hydra_by_hand() -> None:
    made = config("shared_a", num_experts=2, r=1, lora_alpha=1.0)
    layer = lone_linear(made, 2, 2)
    gate = layer.router.gate.weight
    with torch.no_grad():
        layer.experts.lora_A.copy_(torch.tensor([[1.0, 1.0]]))
        layer.experts.lora_B.copy_(torch.tensor([[[1.0], [0.0]], [[0.0], [2.0]]]))
        gate.copy_(torch.tensor([[0.0, 0.0], [torch.log(torch.tensor(3.0)), 0.0]]))
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    delta = call(layer, x) - layer.base_layer(x)
    torch.testing.assert_close(delta, torch.tensor([[0.75, 4.5]]).double(), rtol=1e-6, atol=1e-6)


def test_hydra_with_equal_gates_and_one_mask_keeps_equal_heads_equal() -> None:
    # heads separate through the gates, or through a mask for each head, as in the authors' code
    x = tokens().detach()
    equal = torch.full((TOKENS, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    for per_head in (False, True):
        made = config("shared_a", lora_dropout=0.5, dropout_per_expert=per_head)
        layer = lone_linear(made, D_IN, D_OUT, Told(equal)).train()
        with torch.no_grad():
            layer.experts.lora_B.copy_(layer.experts.lora_B[:1].clone().expand(EXPERTS, -1, -1))
        call(layer, x).square().sum().backward()
        grad = layer.experts.lora_B.grad
        assert torch.allclose(grad, grad[:1].expand_as(grad)) is not per_head


def test_the_router_sees_no_dropout() -> None:
    x, router = tokens().detach(), Told(uneven_weights(TOKENS, EXPERTS))
    for form in FORMS:
        layer = lone_linear(config(form, lora_dropout=0.5), D_IN, D_OUT, router).train()
        call(layer, x)
        assert torch.equal(router.seen, x)


def test_parameters_of_the_forms() -> None:
    # D = 4096, r = 8, 8 experts: HydraLoRA against LoRAs with a router
    sizes = {"num_experts": 8, "r": 8}
    with torch.device("meta"):
        for form, expected in (("lora", 557_056), ("shared_a", 327_680)):
            layer = lone_linear(config(form, **sizes), 4096, 4096)
            trained = [p.numel() for p in layer.parameters() if p.requires_grad]
            assert sum(trained) == expected


def test_mixtral_router_by_hand() -> None:
    made = config(router={**SOFT, "_target_": "routerlab.routers.token_choice.TokenChoice",
                          "top_k": 2, "order": "top_k_first"})  # fmt: skip
    layer = lone_linear(made, 4, 4)
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.eye(4))
    record = layer.router(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), RoutingContext(1, 1))
    assert record.router_probs[0].tolist() == pytest.approx(
        [0.643914, 0.236883, 0.087144, 0.032059], abs=1e-6
    )
    assert record.combine_weights.tolist() == pytest.approx([0.731059, 0.268941], abs=1e-6)
    for shares, support in ((record.router_probs[0], 2.0861), (record.combine_weights, 1.6480)):
        ess = shares.sum() ** 2 / shares.square().sum()
        assert ess.item() == pytest.approx(support, abs=1e-4)


def test_autocast_is_close_to_full_precision() -> None:
    x = torch.randn(64, 32)
    for form in FORMS:
        made = config(form, r=8, lora_alpha=8.0)
        layer = lone_linear(made, 32, 32).float()
        expected = call(layer, x) - layer.base_layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = call(layer, x) - layer.base_layer(x)
        assert (got.float() - expected).norm() < 2e-2 * expected.norm()


def masks(p: float, num: int, context: RoutingContext, **options: Any) -> Tensor:
    return Dropout(p).train()(torch.ones(num, 50), context, **options)


def test_dropout_keeps_the_mean() -> None:
    for p in (0.0, 0.1, 0.5):
        kept = masks(p, 400, RoutingContext(1, 400, seed=3))
        assert kept.mean().item() == pytest.approx(1, abs=0.02)
        assert kept.max().item() == pytest.approx(1 / (1 - p))
        assert (kept == 0).float().mean().item() == pytest.approx(p, abs=0.02)
    assert torch.equal(
        Dropout(0.5).eval()(torch.ones(3, 4), RoutingContext(1, 3)), torch.ones(3, 4)
    )


def test_samples_of_a_policy_share_the_mask() -> None:
    three = masks(0.5, 30, RoutingContext(3, 10, seed=3, num_replicas=3))
    assert torch.equal(three[:10], three[10:20])
    assert torch.equal(three[:10], three[20:])
    alone = masks(0.5, 10, RoutingContext(1, 10, seed=3, replica=2))
    assert torch.equal(alone, three[:10])  # run one by one they draw the same


def test_masks_are_drawn_again_alike_and_differ_elsewhere() -> None:
    context = RoutingContext(1, 20, seed=3)
    mask = masks(0.5, 20, context)
    assert torch.equal(mask, masks(0.5, 20, context))
    for other in (context.at_layer(1), RoutingContext(1, 20, seed=4)):
        assert not torch.equal(mask, masks(0.5, 20, other))
    assert not torch.equal(mask, masks(0.5, 20, context, use="core"))
    heads = masks(0.5, 20, context, draws=3)
    assert heads.shape == (3, 20, 50)
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])


def test_masks_do_not_follow_what_routers_draw() -> None:
    context = RoutingContext(1, 200, seed=3)
    noise = torch.rand(200, 50, generator=context.generator(torch.device("cpu")))
    agree = ((masks(0.5, 200, context) > 0) == (noise >= 0.5)).float().mean().item()
    assert agree == pytest.approx(0.5, abs=0.03)


def test_dropout_of_the_layer_is_on_the_input_of_the_experts() -> None:
    x, weights = tokens().detach(), uneven_weights(TOKENS, EXPERTS).detach()
    context = RoutingContext(1, TOKENS, seed=5)
    for form in FORMS:
        layer = lone_linear(config(form, lora_dropout=0.5), D_IN, D_OUT, Told(weights)).train()
        dropped = layer.experts.dropout(x, context)
        expected = layer.base_layer(x) + naive(layer, dropped, weights) - layer.base_layer(dropped)
        torch.testing.assert_close(call(layer, x, context), expected)


def test_dynmole_drops_nothing_by_dispatch() -> None:
    # the record's assignments against all experts, masked: values and gradients in float32
    made = config(router="dynmole", router_init="kaiming_uniform", r=4)
    layer, x = lone_linear(made, 16, 8).float(), torch.randn(40, 16, requires_grad=True)
    router = layer.router
    torch.nn.init.normal_(router.gate.weight, std=0.5)
    probs = router.gate(x).softmax(-1)
    record = router(x, RoutingContext(1, 40))
    counts = record.dispatch_mask.sum(1)
    assert set(counts.tolist()) >= {2, EXPERTS}  # of sure and of unsure tokens
    lora = torch.einsum("eor,eri,ti->teo", layer.experts.lora_B, layer.experts.lora_A, x)
    mixed = (probs * record.dispatch_mask)[..., None] * lora * layer.experts.scaling
    expected = layer.base_layer(x) + mixed.sum(1)
    inputs = (x, *layer.experts.parameters(), router.gate.weight)
    got, back = call(layer, x), torch.randn(40, 8)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, back),
        torch.autograd.grad(expected, inputs, back),
        strict=True,
    ):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_a_fresh_dynmole_is_the_base() -> None:
    base, ids = tiny_llama(), torch.randint(VOCAB, (2, 7))
    expected = base(ids).logits
    model: Any = get_peft_model(base, config(router="dynmole"))
    for mode in (True, False):
        assert torch.equal(model.train(mode)(ids).logits, expected)
    stir(model)
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_plain_modules_beside_the_mixture_have_the_scale_of_a_lora() -> None:
    sampling = {"_target_": "routerlab.routers.subset_sampling.SubsetSampling", "top_k": 2}
    for changes, expected in (
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4.0, 4.0)),
        ({"omega": "rslora", "router": sampling}, (1.0, 2.0)),  # nothing routes the plain ones
    ):
        made = config(r=4, lora_alpha=8.0, plain_modules=["q_proj"], **changes)
        layers: Any = layers_of(get_peft_model(tiny_llama(), made))
        names = ("layers.00.mlp.up_proj", "layers.00.self_attn.q_proj")
        assert tuple(layers[name].experts.scaling for name in names) == expected
