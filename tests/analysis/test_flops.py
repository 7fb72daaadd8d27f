"""Operations of a forward pass, against counts by hand."""

from functools import partial

import pytest
import torch

from routerlab.analysis.flops import forward_flops
from routerlab.backbones.decoder import Decoder
from routerlab.core.routing import RoutingContext
from routerlab.dispatch.loop import Loop
from routerlab.routers.build import build_router
from tests.helpers.moe_models import wrapped

D, F, E, V, HEADS, KV_HEADS, LAYERS = 32, 48, 4, 64, 4, 2, 2
HEAD = D // HEADS
BATCH, LENGTH = 3, 10


def decoder(router: str = "token_choice", **changes: int) -> Decoder:
    torch.manual_seed(0)
    sizes = {"num_experts": E, "num_shared_experts": 0} | changes
    return Decoder(
        partial(build_router, router), vocab_size=V, d_model=D, num_layers=LAYERS, num_heads=HEADS,
        num_kv_heads=KV_HEADS, d_ff=F, max_positions=16, **sizes,
    )  # fmt: skip


def by_hand(rows: int, gate: bool = True, shared: int = 0) -> int:
    """Two operations for each number of a weight and each token that meets it: queries, keys,
    values, output; gate; three matrices for each of ``rows`` assignments of a layer; the head. And
    scores of all pairs of positions and their weighted sums.
    """
    tokens = BATCH * LENGTH
    projections = 2 * tokens * (D * D + 2 * D * KV_HEADS * HEAD + D * D)
    attention = 2 * (2 * BATCH * HEADS * LENGTH * LENGTH * HEAD)
    experts = 2 * (rows + shared * tokens) * 3 * D * F
    scores = 2 * tokens * D * E if gate else 0
    return LAYERS * (projections + attention + experts + scores) + 2 * tokens * D * V


def ids() -> torch.Tensor:
    return torch.randint(0, V, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("double", [False, True])  # one grouped product, or one product an expert
def test_token_choice(double: bool) -> None:
    model = decoder().double() if double else decoder()
    assert forward_flops(model, ids()) == by_hand(rows=2 * BATCH * LENGTH)


def test_the_readable_dispatch_counts_the_same() -> None:
    model = decoder()
    for layer in model.moe_layers.values():
        layer.dispatch = Loop()
    assert forward_flops(model, ids()) == by_hand(rows=2 * BATCH * LENGTH)


def test_shared_experts_see_every_token() -> None:
    model = decoder(num_shared_experts=1)
    assert forward_flops(model, ids()) == by_hand(rows=2 * BATCH * LENGTH, shared=1)


def test_a_router_without_a_gate_costs_no_scores() -> None:
    assert forward_flops(decoder("hash"), ids()) == by_hand(2 * BATCH * LENGTH, gate=False)


def test_all_experts_for_every_token() -> None:
    assert forward_flops(decoder("soft"), ids()) == by_hand(E * BATCH * LENGTH)


def test_a_dynamic_router_costs_what_it_asks_for() -> None:
    model = decoder("threshold")
    records = model.eval()(ids()).router_outputs.values()
    rows = [len(record.expert_indices) for record in records]
    assert len(set(rows)) > 1 or rows[0] % (BATCH * LENGTH)  # no fixed number of experts
    assert forward_flops(model, ids()) == sum(by_hand(count) for count in rows) / LAYERS


def test_padding_reaches_no_expert() -> None:
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid[0, :4] = False
    context = RoutingContext(BATCH, LENGTH, valid=valid.flatten())
    assert forward_flops(decoder(), ids(), context) == by_hand(2 * (BATCH * LENGTH - 4))


def test_the_model_is_left_as_it_was() -> None:
    model = decoder()
    for training in (True, False):
        model.train(training)
        forward_flops(model, ids())
        assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_trunk_in_memory_saves_nothing() -> None:
    model = decoder(num_experts=[0, E])  # type: ignore[arg-type]
    whole = forward_flops(model, ids())
    model.requires_grad_(False)
    model.layers[1].requires_grad_(True)
    model.keep_trunk()
    model(ids())
    assert forward_flops(model, ids()) == whole


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_a_model_of_transformers(family: str) -> None:
    """8 experts of width 48, 4 heads on 2 key-value heads, as `wrapped` makes them."""
    native = wrapped(family)
    ours = wrapped(family, router=partial(build_router, "token_choice", top_k=2))
    tokens = BATCH * LENGTH
    config = native.model.config
    layers, heads, kv_heads = 3, config.num_attention_heads, config.num_key_value_heads
    projections = 2 * tokens * (2 * D * D + 2 * D * D * kv_heads // heads)
    experts, gate = 2 * (2 * tokens) * 3 * D * 48, 2 * tokens * D * 8
    attention = 4 * BATCH * LENGTH * LENGTH * D
    wanted = layers * (projections + attention + experts + gate) + 2 * tokens * D * 64
    assert forward_flops(native, ids()) == wanted
    assert forward_flops(ours, ids()) == wanted
