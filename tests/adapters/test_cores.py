"""CoMoL: cores between one A and one B, against the paper's formula token by token."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from routerlab.adapters import MixtureOfLoraConfig
from routerlab.core.routing import RoutingContext
from tests.helpers.language_models import VOCAB, tiny_llama
from tests.helpers.mixtures import SOFT, Told, call, lone_linear, mixture, uneven_weights

D_IN, D_OUT, EXPERTS, RANK, TOKENS = 6, 5, 4, 3, 9
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def config(**changes: Any) -> MixtureOfLoraConfig:
    sizes = {"num_experts": EXPERTS, "r": RANK, "lora_alpha": RANK, "router": SOFT}
    return MixtureOfLoraConfig(experts="core", **(sizes | changes))


def tokens() -> Tensor:
    return torch.randn(TOKENS, D_IN, dtype=torch.float64, requires_grad=True)


def naive(layer: Any, x: Tensor, weights: Tensor) -> Tensor:
    """W x + s B (sum_i w_i M_i) A x: the core of each token is merged, then applied."""
    experts, rows = layer.experts, []
    for row, shares in zip(x, weights * (weights != 0), strict=True):
        core = sum(share * m for share, m in zip(shares, experts.lora_core, strict=True))
        rows.append(experts.scaling * experts.lora_B @ core @ (experts.lora_A @ row))
    return layer.base_layer(x) + torch.stack(rows)


def test_by_hand() -> None:
    layer = lone_linear(config(num_experts=2, r=2, lora_alpha=2.0), 2, 2)
    with torch.no_grad():
        for weight in (layer.experts.lora_A, layer.experts.lora_B, layer.experts.lora_core[0]):
            weight.copy_(torch.eye(2))
        layer.experts.lora_core[1].copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        layer.router.gate.weight.copy_(torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]))
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    delta = call(layer, x) - layer.base_layer(x)
    assert delta[0].tolist() == pytest.approx([1.25, 1.75], abs=1e-7)


@pytest.mark.parametrize("core_router", [True, False])
def test_mixing_outputs_is_merging_cores(core_router: bool) -> None:
    weights, x = uneven_weights(TOKENS, EXPERTS), tokens()
    router = Told(weights)
    layer = lone_linear(config(core_router=core_router), D_IN, D_OUT, router)
    experts = layer.experts
    inputs = (x, weights, experts.lora_A, experts.lora_core, experts.lora_B)
    back = torch.randn(TOKENS, D_OUT, dtype=torch.float64)
    got, expected = call(layer, x), naive(layer, x, weights)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, back),
        torch.autograd.grad(expected, inputs, back),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert router.seen is not None
    torch.testing.assert_close(router.seen, x @ experts.lora_A.T if core_router else x)


def test_the_gate_teaches_a_through_the_code() -> None:
    # A learns through the mixed code and through the gate that reads it
    x = tokens().detach()
    layer = lone_linear(config(), D_IN, D_OUT)
    got = torch.autograd.grad(call(layer, x).square().sum(), layer.experts.lora_A)[0]
    weights = layer.router(x @ layer.experts.lora_A.T).router_probs.detach()
    fixed = naive(layer, x, weights).square().sum()
    without_gate = torch.autograd.grad(fixed, layer.experts.lora_A)[0]
    assert not torch.allclose(got, without_gate)
    live = naive(layer, x, layer.router(x @ layer.experts.lora_A.T).router_probs).square().sum()
    torch.testing.assert_close(got, torch.autograd.grad(live, layer.experts.lora_A)[0])


def parameters_of(sizes: dict[str, int], adapter: Any) -> int:
    layers = sizes["num_hidden_layers"]  # all alike: one is built
    with torch.device("meta"):
        base = Qwen3ForCausalLM(Qwen3Config(**sizes | {"num_hidden_layers": 1}))
        model = get_peft_model(base, adapter)
        return layers * sum(p.numel() for p in model.parameters() if p.requires_grad)


def qwen(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }


def test_parameters_of_qwen3() -> None:
    small, large = qwen(4096, 12288, 36, 32), qwen(5120, 17408, 40, 40)
    lora = LoraConfig(r=16, target_modules=TARGETS)
    assert parameters_of(small, lora) == 24_772_608
    assert parameters_of(large, lora) == 35_389_440
    for sizes, num_experts, core_router, expected in (
        (small, 8, True, 25_164_288),
        (small, 64, True, 27_906_048),
        (small, 8, False, 33_398_784),
        (small, 64, False, 93_782_016),
        (large, 8, True, 35_824_640),
    ):
        made = config(
            r=16, num_experts=num_experts, core_router=core_router, target_modules=TARGETS
        )
        assert parameters_of(sizes, made) == expected


def test_a_fresh_adapter_is_the_base_and_moves_b_first() -> None:
    base, ids = tiny_llama(), torch.randint(VOCAB, (2, 7))
    expected = base(ids).logits
    model: Any = get_peft_model(base, config(target_modules=TARGETS, lora_dropout=0.1))
    assert torch.equal(model.eval()(ids).logits, expected)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(ids).logits.square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_B" in name}


def test_fresh_cores_differ_within_the_bound_of_the_reference() -> None:
    core = lone_linear(config(r=16), 32, 32).experts.lora_core
    assert core.abs().max() <= 0.25
    assert core.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.1)
    assert not torch.allclose(core[0], core[1])


def test_identity_cores_are_plain_lora_for_any_router() -> None:
    x, layer = tokens(), lone_linear(config(lora_alpha=5.0), D_IN, D_OUT)
    with torch.no_grad():
        layer.experts.lora_core.copy_(torch.eye(RANK).expand(EXPERTS, -1, -1))
    plain = layer.base_layer(x) + 5 / 3 * x @ layer.experts.lora_A.T @ layer.experts.lora_B.T
    torch.testing.assert_close(call(layer, x), plain)


def test_one_core() -> None:
    x, layer = tokens(), lone_linear(config(num_experts=1), D_IN, D_OUT)
    experts = layer.experts
    merged = experts.lora_B @ experts.lora_core[0] @ experts.lora_A
    y = call(layer, x)
    torch.testing.assert_close(y, layer.base_layer(x) + x @ merged.T)
    y.square().sum().backward()
    assert layer.router.gate.weight.grad.abs().max() == 0


def test_permuting_cores_with_rows_of_the_router_changes_nothing() -> None:
    x, layer = tokens(), lone_linear(config(), D_IN, D_OUT)
    before, order = call(layer, x), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        layer.experts.lora_core.copy_(layer.experts.lora_core[order])
        layer.router.gate.weight.copy_(layer.router.gate.weight[order])
    torch.testing.assert_close(call(layer, x), before)


def test_gates_are_of_single_tokens() -> None:
    x, layer = tokens().detach(), lone_linear(config(), D_IN, D_OUT)
    codes = x @ layer.experts.lora_A.T
    probs = layer.router(codes).router_probs
    assert not torch.allclose(probs[0], probs[1])
    before = call(layer, x)
    x[3] += 1
    after = call(layer, x)
    others = torch.arange(TOKENS) != 3
    assert torch.equal(after[others], before[others])
    assert not torch.allclose(after[3], before[3])


def test_a_sequence_alone_and_in_a_padded_batch() -> None:
    model = mixture(
        tiny_llama(), torch.float32, experts="core", router=SOFT, num_experts=4, r=4,
        target_modules=TARGETS,
    ).eval()  # fmt: skip
    ids = torch.randint(2, VOCAB, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4], ids[0, :4] = 0, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    alone = model(input_ids=ids[:1, 4:]).logits
    torch.testing.assert_close(batch[:1, 4:], alone, rtol=1e-4, atol=1e-5)


def test_any_lora_has_a_core_between_orthonormal_factors() -> None:
    up, down = torch.randn(6, 3).double(), torch.randn(3, 8).double()
    u_b, s_b, v_b = torch.linalg.svd(up, full_matrices=False)
    u_a, s_a, v_a = torch.linalg.svd(down, full_matrices=False)
    layer = lone_linear(config(num_experts=1), 8, 6)
    with torch.no_grad():
        layer.experts.lora_A.copy_(v_a)
        layer.experts.lora_B.copy_(u_b)
        layer.experts.lora_core[0] = s_b.diag() @ v_b @ u_a @ s_a.diag()
    x = torch.randn(4, 8).double()
    delta = call(layer, x) - layer.base_layer(x)
    torch.testing.assert_close(delta, x @ down.T @ up.T, rtol=0, atol=1e-12)


def test_checkpoints_of_the_authors_have_transposed_cores() -> None:
    # their row form: z = xh Core; each core is transposed on import
    x, layer = tokens(), lone_linear(config(), D_IN, D_OUT)
    theirs = torch.randn(EXPERTS, RANK, RANK, dtype=torch.float64)
    with torch.no_grad():
        layer.experts.lora_core.copy_(theirs.transpose(1, 2))
    codes = x @ layer.experts.lora_A.T
    gates = nn.functional.softmax(codes @ layer.router.gate.weight.T, -1)
    mixed = torch.einsum("tr,te,erq->tq", codes, gates, theirs)
    torch.testing.assert_close(call(layer, x), layer.base_layer(x) + mixed @ layer.experts.lora_B.T)


def test_core_dropout_is_that_of_the_authors() -> None:
    x, weights = tokens().detach(), uneven_weights(TOKENS, EXPERTS).detach()
    context = RoutingContext(1, TOKENS, seed=4)
    made = config(lora_dropout=0.5, core_dropout=True)
    layer = lone_linear(made, D_IN, D_OUT, Told(weights))
    experts, drop = layer.experts, layer.experts.dropout
    torch.testing.assert_close(call(layer.eval(), x, context), naive(layer, x, weights))
    layer.train()
    codes = drop(x, context) @ experts.lora_A.T
    merged = torch.einsum("te,eqr->tqr", weights, experts.lora_core)
    mixed = torch.einsum("tqr,tr->tq", drop(merged, context, use="core"), codes)
    mixed = drop(mixed, context, use="mixed")
    expected = layer.base_layer(x) + mixed @ experts.lora_B.T
    torch.testing.assert_close(call(layer, x, context), expected)
    assert layer.mix_router["default"].seen is not None
    torch.testing.assert_close(layer.mix_router["default"].seen, codes)  # the gate reads it too
