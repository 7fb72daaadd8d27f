"""MixLoRA: feed-forward experts against a loop over tokens and experts, and its losses."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Config
from transformers.models.llama.modeling_llama import LlamaMLP

from routerlab.adapters import MixtureOfLoraConfig
from routerlab.adapters.feed_forward import MixtureFeedForward, linears_of
from routerlab.adapters.state import RoutingState
from routerlab.adapters.targets import widths_of
from routerlab.core.routing import RoutingContext
from routerlab.losses.load_balancing import LoadBalancingLoss
from tests.helpers.language_models import VOCAB, tiny_llama
from tests.helpers.mixtures import (
    SOFT,
    TOP_2,
    Told,
    call,
    finished,
    layers_of,
    lone_linear,
    mixture,
    records_of,
    uneven_weights,
)

WIDTH, HIDDEN, EXPERTS, RANK, TOKENS = 6, 7, 4, 3, 9


def config(**changes: Any) -> MixtureOfLoraConfig:
    sizes = {"num_experts": EXPERTS, "r": RANK, "lora_alpha": 2.0, "router": SOFT}
    return MixtureOfLoraConfig(experts="feed_forward", **(sizes | changes))


def llama_mlp(bias: bool = True) -> LlamaMLP:
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": 1}
    return LlamaMLP(LlamaConfig(mlp_bias=bias, **sizes))


def gpt2_mlp(dropout: float = 0.0) -> GPT2MLP:
    sizes = GPT2Config(n_embd=WIDTH, n_head=1, resid_pdrop=dropout, initializer_range=0.2)
    mlp = GPT2MLP(HIDDEN, sizes)
    for linear in (mlp.c_fc, mlp.c_proj):
        nn.init.normal_(linear.bias)
    return mlp


def lone(
    mlp: nn.Module, made: MixtureOfLoraConfig, router: nn.Module | None = None
) -> MixtureFeedForward:
    names = linears_of(mlp)
    assert names is not None
    kinds = zip(("gate", "up", "down"), names, strict=True)
    widths = {kind: widths_of(getattr(mlp, name)) for kind, name in kinds if name is not None}
    mlp.requires_grad_(False)
    layer = MixtureFeedForward(
        mlp, widths, names, "layers.00.mlp", "layers.00", RoutingState()  # type: ignore[arg-type]
    )  # fmt: skip
    return finished(layer, made, router)


def naive(layer: Any, x: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i E_i(h) + (1 - sum w) FFN(h): each expert's network, token by token."""
    experts, mlp, rows = layer.experts, layer.base_layer, []
    kinds = dict(zip(("gate", "up", "down"), layer.names, strict=True))

    def linear(kind: str, u: Tensor, i: int) -> Tensor:
        a, b = experts.lora_A[kind][i], experts.lora_B[kind][i]
        return getattr(mlp, kinds[kind])(u[None])[0] + experts.scaling * (b @ (a @ u))

    act = mlp.act_fn if kinds["gate"] else mlp.act
    for row, shares in zip(x, weights * (weights != 0), strict=True):
        y = (1 - shares.sum()) * mlp(row[None])[0]
        for i, share in enumerate(shares):
            hidden = linear("up", row, i)
            hidden = act(linear("gate", row, i)) * hidden if kinds["gate"] else act(hidden)
            y = y + share * linear("down", hidden, i)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("make", [llama_mlp, gpt2_mlp])
def test_values_and_gradients(make: Any) -> None:
    # weights that do not sum to 1, tokens without experts and with all, in any order
    weights = uneven_weights(TOKENS, EXPERTS)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    layer = lone(make(), config(), Told(weights))
    inputs = [x, weights, *layer.experts.parameters()]
    back = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    got, expected = call(layer, x), naive(layer, x, weights)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, back),
        torch.autograd.grad(expected, inputs, back),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)]
)
def test_precision(dtype: torch.dtype, rtol: float) -> None:
    made, x = config(router=TOP_2), torch.randn(50, WIDTH)
    layer = lone(llama_mlp(), made)
    record = layer.router(x.double(), RoutingContext(1, 50))
    weights = torch.zeros(50, EXPERTS, dtype=torch.float64).index_put(
        (record.token_indices, record.expert_indices), record.combine_weights.double()
    )
    expected = naive(layer, x.double(), weights).float()
    layer = layer.float()
    if dtype == torch.float32:
        got = call(layer, x)
    else:
        with torch.autocast("cpu", dtype=dtype):
            got = call(layer, x)
    assert (got.float() - expected).norm() < rtol * expected.norm()


class Relu(nn.Module):
    """A scalar network without a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.act = nn.ReLU()
        for linear in (self.fc1, self.fc2):
            nn.init.ones_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def test_experts_are_inside_the_nonlinearity() -> None:
    # deltas +1 and -3 on the first linear: mixing the networks gives 1, mixing the deltas 0
    x, halves = torch.ones(1, 1).double(), Told(torch.full((1, 2), 0.5, dtype=torch.float64))
    made = {"num_experts": 2, "r": 1, "lora_alpha": 1.0}
    layer, deltas = lone(Relu(), config(**made), halves), torch.tensor([1.0, -3.0])
    plug_in = lone_linear(MixtureOfLoraConfig(router=SOFT, **made), 1, 1, halves)
    with torch.no_grad():
        for experts in (layer.experts, plug_in.experts):
            for parameter in experts.parameters():
                parameter.zero_()
        for a, b in (
            (layer.experts.lora_A["up"], layer.experts.lora_B["up"]),
            (plug_in.experts.lora_A, plug_in.experts.lora_B),
        ):
            a.fill_(1.0)
            b.copy_(deltas[:, None, None])
        plug_in.base_layer.weight.fill_(1.0)
        plug_in.base_layer.bias.zero_()
    assert call(layer, x).item() == pytest.approx(1.0)
    assert plug_in.base_layer(x).item() == 1.0
    assert torch.relu(call(plug_in, x)).item() == pytest.approx(0.0)


@pytest.mark.parametrize("router", ["mixtral", "soft", "dynmole", "switch", "expert_choice"])
def test_a_fresh_adapter_is_the_base(router: str) -> None:
    base, ids = tiny_llama(), torch.randint(VOCAB, (2, 7))
    expected = base(ids).logits
    model: Any = get_peft_model(base, config(router=router))
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_one_expert_is_plain_lora() -> None:
    ids, sizes = torch.randint(VOCAB, (2, 7)), {"r": 4, "lora_alpha": 8.0}
    names = ["gate_proj", "up_proj", "down_proj"]
    plain: Any = get_peft_model(tiny_llama(), LoraConfig(target_modules=names, **sizes)).double()
    mixed = mixture(tiny_llama(), experts="feed_forward", num_experts=1, router=SOFT, **sizes)
    with torch.no_grad():
        for number, mine in enumerate(layers_of(mixed).values()):
            mlp = plain.base_model.model.model.layers[number].mlp
            for kind, name in zip(("gate", "up", "down"), names, strict=True):
                theirs = getattr(mlp, name)
                theirs.lora_A["default"].weight.copy_(mine.experts.lora_A[kind][0])
                theirs.lora_B["default"].weight.copy_(mine.experts.lora_B[kind][0])
    torch.testing.assert_close(mixed(ids).logits, plain(ids).logits, rtol=1e-9, atol=1e-9)


def test_parameters_of_llama_2_7b() -> None:
    sizes = {"num_hidden_layers": 1}  # of 32, all alike; the other defaults are LLaMA-2-7B's
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    made = config(num_experts=8, r=16, router=TOP_2, plain_modules=attention)
    every = [*attention, "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=80, target_modules=every)
    counts = []
    with torch.device("meta"):
        for adapter in (made, lora):
            model: Any = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), adapter)
            named = {n: 32 * p.numel() for n, p in model.named_parameters() if p.requires_grad}
            counts.append(named)
    mixed = sum(size for name, size in counts[0].items() if ".mlp." in name)
    assert mixed == 186_646_528
    assert sum(counts[0].values()) - mixed == 16_777_216
    assert sum(counts[1].values()) == 199_884_800


def adapted() -> Any:
    return mixture(tiny_llama(), experts="feed_forward", num_experts=4, r=4, router=TOP_2)


def test_each_token_has_exactly_k_experts() -> None:
    model, ids = adapted(), torch.randint(VOCAB, (3, 8))
    model(ids)
    assert list(records_of(model)) == ["layers.00.mlp", "layers.01.mlp"]
    for record in records_of(model).values():
        assert torch.equal(record.dispatch_mask.sum(1), torch.full((24,), 2))
        assert record.num_dropped == 0
        assert record.tokens_per_expert.sum() == 48
        torch.testing.assert_close(
            record.combine_weights.view(-1, 2).sum(1), torch.ones(24).double()
        )


def test_the_loss_teaches_the_router_and_not_the_experts_of_its_block() -> None:
    model, ids = adapted(), torch.randint(VOCAB, (3, 8))
    layers, loss = list(layers_of(model).values()), LoadBalancingLoss()
    model(ids)
    record = records_of(model)["layers.01.mlp"]
    value = loss(record)
    counts = record.tokens_per_expert / 48
    torch.testing.assert_close(value, 4 * (counts * record.router_probs.mean(0)).sum())
    value.backward()
    assert layers[1].router.gate.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in layers[1].experts.parameters())
    assert any(p.grad.abs().max() > 0 for p in layers[0].experts.parameters())


def test_padding_changes_neither_loss_nor_counts() -> None:
    model, ids = adapted(), torch.randint(2, VOCAB, (1, 8))
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(11) >= 3).long()[None]
    model(ids)
    alone = records_of(model)
    model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for name, record in records_of(model).items():
        assert torch.equal(record.tokens_per_expert, alone[name].tokens_per_expert)
        torch.testing.assert_close(LoadBalancingLoss()(record), LoadBalancingLoss()(alone[name]))


def test_dropout_is_on_the_input_of_every_lora() -> None:
    num, row = 4000, torch.randn(1, WIDTH, dtype=torch.float64)
    x, context = row.expand(num, -1), RoutingContext(1, num, seed=2)
    weights = torch.rand(1, EXPERTS, dtype=torch.float64).expand(num, -1)
    layer = lone(llama_mlp(), config(lora_dropout=0.5), Told(weights))
    for kind in ("gate", "up", "down"):
        with torch.no_grad():
            for name in ("gate", "up", "down"):  # one LoRA at a time says something
                nn.init.constant_(layer.experts.lora_B[name], float(name == kind))
        dry = call(layer.eval(), x, context)[0]
        wet = call(layer.train(), x, context)
        assert len(wet.unique(dim=0)) > 4
        assert torch.equal(wet, call(layer, x, context))
    spread = wet.std(0) / num**0.5  # down is linear in its mask: the mean is kept
    assert ((wet.mean(0) - dry).abs() < 5 * spread).all()


def test_samples_of_a_policy_share_the_masks() -> None:
    weights = uneven_weights(TOKENS, EXPERTS).detach()
    layer = lone(llama_mlp(), config(lora_dropout=0.5), Told(weights.repeat(2, 1))).train()
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64).repeat(2, 1)
    both = call(layer, x, RoutingContext(2, TOKENS, seed=2, num_replicas=2))
    torch.testing.assert_close(both[:TOKENS], both[TOKENS:])


def test_the_dropout_at_the_end_of_the_network_stays() -> None:
    router = Told(torch.zeros(TOKENS, EXPERTS, dtype=torch.float64))
    layer = lone(gpt2_mlp(dropout=0.5), config(), router).train()
    y = call(layer, torch.randn(TOKENS, WIDTH, dtype=torch.float64))
    assert 0.2 < (y == 0).float().mean() < 0.8
