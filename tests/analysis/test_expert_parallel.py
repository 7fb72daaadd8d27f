"""What expert parallelism would cost: the cost model by hand, its limits, and real models."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import routerlab as rl
from routerlab.analysis import trace
from routerlab.analysis.expert_parallel.layer import (
    device_batches,
    layer_cost,
    local_elements,
    local_seconds,
    token_seconds,
)
from routerlab.analysis.expert_parallel.loads import (
    apportion,
    hot_loads,
    recorded_loads,
    run_cases,
    trace_loads,
    zipf_loads,
)
from routerlab.analysis.expert_parallel.machines import (
    LAYERS,
    MACHINES,
    MODELS,
    LayerShape,
    Machine,
    ModelShape,
)
from routerlab.analysis.expert_parallel.methods import Knobs, check_group, simulate_layer
from routerlab.analysis.expert_parallel.model import Setup, simulate_model
from routerlab.analysis.expert_parallel.replication import plan_replicated
from routerlab.backbones.decoder import Decoder
from routerlab.ops.least_loaded import plan_ep, plan_llep, send_matrix

H200 = MACHINES["h200"]
# Rates that make sums easy: 1 FLOP, 1 byte a second, and no overheads.
UNIT = Machine(1.0, 1.0, 1.0, 1.0, 1.0, 8, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)


# -- the paper's cost model -----------------------------------------------------------------------


def test_the_paper_s_time_and_memory_by_hand() -> None:
    loads, width, hidden = [80, 10, 5, 5], 4, 8
    ep, llep = (device_batches(p) for p in (plan_ep(loads, 2), plan_llep(loads, 2, min_tokens=1)))

    def elements(batches: Sequence[Sequence[int]]) -> list[int]:
        return [local_elements(b, width + hidden, width * hidden) for b in batches]

    def slowest(batches: Sequence[Sequence[int]], overhead: float) -> float:
        return max(local_seconds(b, overhead, lambda count: 0.01) for b in batches)

    assert (elements(ep), elements(llep)) == ([1144, 184], [664, 696])
    assert slowest(ep, 0.1) == pytest.approx(1.1)
    assert slowest(llep, 0.1) == pytest.approx(0.8)
    assert slowest(ep, 1.0) == pytest.approx(2.9)
    assert slowest(llep, 1.0) == pytest.approx(3.5)  # more products, and dear ones


def test_a_token_of_a_large_batch_costs_less() -> None:
    shape = LAYERS["gpt-oss-120b"]
    seconds = token_seconds(shape, H200)
    costs = [seconds(count) for count in (1, 16, 256, 4096, 65536)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 100 * costs[-1]
    products = 6 * shape.d_model * shape.d_ff / (0.65 * 989e12)
    assert products < costs[-1] < 1.2 * products


def test_a_layer_by_hand() -> None:
    shape = LayerShape(num_experts=2, d_model=2, d_ff=1, top_k=1)  # an expert has 6 weights
    cost = layer_cost(plan_ep([6, 2], 2), shape, UNIT)
    # A rank has 4 tokens, 3 of expert 0: device 0 receives 3 and sends 1, of 4 bytes each, twice.
    assert cost.exchange_seconds == 2 * 3 * 4
    # A batch of 6: products 12 FLOP each; 4 x 2 + 3 numbers of 2 bytes pass through memory.
    assert cost.compute_seconds == 6 * (12 + 22)
    assert cost.seconds == cost.compute_seconds + cost.exchange_seconds + 4 * 2 * 2 * 4
    assert cost.memory_bytes == 2 * (6 + 6 * (2 * 2 + 3))
    trained = layer_cost(plan_ep([6, 2], 2), shape, UNIT, training=True)
    assert trained.compute_seconds == 3 * cost.compute_seconds
    assert trained.exchange_seconds == 2 * cost.exchange_seconds


def test_moved_weights_share_the_links_with_the_tokens() -> None:
    shape = LayerShape(num_experts=2, d_model=2, d_ff=1, top_k=1)
    plan = plan_llep([6, 2], 2, min_tokens=1)
    assert plan.transfers == ((0, 0, 1),)
    cost = layer_cost(plan, shape, UNIT)
    # Device 0 keeps tokens 0 to 4 of expert 0, of which device 1 has the last: one token each way.
    assert cost.exchange_seconds == (4 + 12) + 4
    assert cost.transfer_bytes == 12
    far = replace(UNIT, devices_per_node=1, network=0.5)
    assert layer_cost(plan, shape, far).exchange_seconds == 2 * cost.exchange_seconds


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=8, max_size=8), st.sampled_from([2, 4, 8]),
       st.sampled_from([1, 2, 4, 8]))  # fmt: skip
def test_traffic_is_that_of_the_send_matrix(loads: list[int], devices: int, node: int) -> None:
    loads = [load * devices for load in loads]  # as many of each expert on every rank
    shape = LayerShape(num_experts=8, d_model=1, d_ff=1, top_k=1)
    machine = replace(UNIT, devices_per_node=node, network=0.25, memory_bandwidth=float("inf"))
    plan = plan_llep(loads, devices, min_tokens=1)
    sends = send_matrix([[load // devices for load in loads]] * devices, plan)
    busy = [0.0]
    for near, rate in ((True, 1.0), (False, 0.25)):
        pairs = [(s, d) for s in range(devices) for d in range(devices)
                 if s != d and (s // node == d // node) == near]  # fmt: skip
        moved = [(s, d, 2 * sends[s][d]) for s, d in pairs]
        weights = [(s, d, 6) for _, s, d in plan.transfers if (s, d) in pairs]
        back = [(s, d, 2 * sends[s][d]) for s, d in pairs]
        busy.append(fullest(moved + weights, devices) / rate)
        busy.append(fullest(back, devices) / rate)
    expected = max(busy[1], busy[3]) + max(busy[2], busy[4])
    assert layer_cost(plan, shape, machine).exchange_seconds == pytest.approx(expected)


def fullest(messages: Sequence[tuple[int, int, int]], devices: int) -> int:
    """The most bytes that one device sends or receives."""
    sent = [sum(n for s, _, n in messages if s == p) for p in range(devices)]
    received = [sum(n for _, d, n in messages if d == p) for p in range(devices)]
    return max(sent + received)


# -- methods --------------------------------------------------------------------------------------


def test_copies_go_to_the_hottest_and_rest_with_the_coldest() -> None:
    plan = plan_replicated([80, 10, 6, 4], 2, extra=1)
    # Copies by hand: expert 0 twice more; its 26.7 a copy, then 10, 6, 4, on three places a device.
    assert plan.path == "replicated"
    assert [len(r) for r in plan.assignments] == [3, 1, 1, 1]
    assert plan.assignments[0] == ((0, 0, 26), (0, 26, 53), (1, 53, 80))
    assert plan.device_load == (57, 43)
    assert plan.transfers == ()
    repacked = plan_replicated([100, 100, 0, 0], 2, extra=0)
    assert repacked.device_load == (100, 100)


def test_copies_placed_for_other_loads_help_less() -> None:
    loads, before = [80, 10, 6, 4], [4, 6, 10, 80]
    foreseen, stale = (plan_replicated(loads, 4, 1, expected) for expected in (None, before))
    # five copies of 16, two of them on device 0; one of 80, beside a copy of expert 3
    assert foreseen.device_load == (32, 26, 22, 20)
    assert max(stale.device_load) == 81
    with pytest.raises(ValueError, match="expected loads of 2 experts: there are 4"):
        plan_replicated(loads, 4, 1, [1, 2])
    with pytest.raises(ValueError, match="extra=-1"):
        plan_replicated(loads, 4, -1)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 10**5), min_size=16, max_size=16), st.sampled_from([1, 2, 4, 16]),
       st.integers(0, 3))  # fmt: skip
def test_replication_computes_every_token_once(loads: list[int], devices: int, extra: int) -> None:
    plan = plan_replicated(loads, devices, extra)
    for load, ranges in zip(loads, plan.assignments, strict=True):
        ends = [0, *(r.end for r in ranges)]
        assert [r.start for r in ranges] == ends[:-1]
        assert ends[-1] == load
    assert sum(plan.device_load) == sum(loads)
    assert all(len(batches) <= 16 // devices + extra for batches in device_batches(plan))


def test_balanced_loads_cost_the_same_by_every_path() -> None:
    shape = LAYERS["gpt-oss-120b"]
    costs = simulate_layer([4096] * 128, shape, 8, H200)
    assert costs["llep"] == costs["ep"]
    assert costs["replication"].max_load == costs["ep"].max_load


def test_the_gain_grows_with_imbalance_and_stays_below_the_ratio_of_loads() -> None:
    shape, total = LAYERS["gpt-oss-120b"], 32768 * 8 * 4
    gains, memory = [], []
    for share in (0.3, 0.5, 0.8, 0.95):
        costs = simulate_layer(hot_loads(128, total, share, 4), shape, 8, H200)
        ep, llep = costs["ep"], costs["llep"]
        gains.append(ep.seconds / llep.seconds)
        memory.append((ep.memory_bytes, llep.memory_bytes))
        assert 1 < gains[-1] < ep.imbalance
        assert (llep.imbalance, llep.path) == (1.0, "llep")
    assert gains == sorted(gains)
    assert memory[-1][0] > 5 * memory[-1][1]
    assert len({llep for _, llep in memory}) == 1


def test_llep_loses_where_weights_outweigh_tokens() -> None:
    shape = LAYERS["gpt-oss-120b"]
    loads = hot_loads(128, 64 * 8 * 4, 0.3, 4)
    always = simulate_layer(loads, shape, 8, H200, Knobs(min_tokens=1, threshold=None))
    assert always["llep"].imbalance < always["ep"].imbalance
    assert always["llep"].seconds > always["ep"].seconds


def test_a_group_over_nodes_pays_for_the_network() -> None:
    shape = LAYERS["gpt-oss-120b"]
    near, far = (simulate_layer([4096 * p] * 128, shape, p, H200)["ep"] for p in (8, 64))
    assert far.max_load == near.max_load
    assert far.exchange_seconds > 5 * near.exchange_seconds


def test_groups_divide_devices_and_experts() -> None:
    check_group(1024, 64, 128)
    for devices, group, words in (
        (12, 8, "group=8: .* the 12 devices; both allow 1, 2, 4"),
        (24, 3, "group=3: .* the 128 experts; both allow 1, 2, 4, 8"),
        (8, 0, "group=0"),
    ):
        with pytest.raises(ValueError, match=words):
            check_group(devices, group, 128)
    with pytest.raises(ValueError, match="loads of 4 experts: the layer has 128"):
        simulate_layer([1] * 4, LAYERS["gpt-oss-120b"], 2, H200)


# -- loads ----------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.integers(0, 10**7))
def test_whole_loads_add_up_and_keep_their_shares(shares: list[float], total: int) -> None:
    shares[0] += 1e-3
    loads = apportion(shares, total)
    assert sum(loads) == total
    for load, share in zip(loads, shares, strict=True):
        assert abs(load - share * total / sum(shares)) < 1 + 1e-6


def test_synthetic_loads() -> None:
    assert hot_loads(6, 100, 0.8, 2) == [40, 40, 5, 5, 5, 5]
    assert zipf_loads(4, 40, 0.0) == [10] * 4
    assert sorted(zipf_loads(4, 250, 1.0), reverse=True) == [120, 60, 40, 30]
    assert zipf_loads(64, 10**6, 1.0) == zipf_loads(64, 10**6, 1.0)
    for share, hot in ((1.1, 2), (0.5, 6), (0.5, 0)):
        with pytest.raises(ValueError, match="share=|num_hot="):
            hot_loads(6, 100, share, hot)
    with pytest.raises(ValueError, match="not all 0"):
        apportion([0, 0], 4)


def test_loads_of_a_run(finished_run: Path, tmp_path: Path) -> None:
    shares = recorded_loads(finished_run)
    counts = trace_loads(finished_run)
    assert [name.removesuffix(".moe") for name in counts] == list(shares)
    recorded = trace.load(finished_run)
    for layer, (name, count) in zip(shares.values(), counts.items(), strict=True):
        assert all(sum(load) == pytest.approx(1, abs=1e-5) for load in layer.values())
        assert sum(count) == len(recorded.layers[name].expert_indices)
    first, (steps, *_) = run_cases(finished_run)[0], shares.values()
    assert first.loads(1000) == apportion(steps[max(steps)], 1000)
    assert first.expected is not None
    with pytest.raises(ValueError, match="holds no run"):
        recorded_loads(tmp_path)
    lines = [{"step": 1, "name": "train/other", "value": [1]}]
    (tmp_path / "distributions.jsonl").write_text(json.dumps(lines[0]) + "\n{torn")
    with pytest.raises(ValueError, match="holds no expert_load"):
        recorded_loads(tmp_path)


# -- whole models ---------------------------------------------------------------------------------


def decoder(shape: ModelShape, **changes: bool) -> Decoder:
    """The decoder of that shape."""
    same = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff",
            "num_experts", "tie_embeddings")  # fmt: skip
    return Decoder(
        lambda **sizes: rl.build_router("token_choice", top_k=shape.top_k, **sizes),
        max_positions=64, dispatch="autograd", **{n: getattr(shape, n) for n in same}, **changes,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "billions"), [("olmoe-1b-7b", 6.92), ("mixtral-8x7b", 46.7),
    ("qwen3-30b-a3b", 30.5), ("gpt-oss-20b", 20.9), ("gpt-oss-120b", 116.8)])  # fmt: skip
def test_models_have_their_published_size(name: str, billions: float) -> None:
    shape = MODELS[name]
    total = shape.expert_parameters + shape.other_parameters
    assert total / 1e9 == pytest.approx(billions, rel=3e-3)


@pytest.mark.parametrize("name", ["quickstart", "olmoe-1b-7b"])
def test_parameters_are_those_of_the_decoder(name: str) -> None:
    shape = replace(MODELS[name], num_layers=2)
    with torch.device("meta"):
        counted = decoder(shape).count_parameters()
    assert shape.expert_parameters + shape.other_parameters == counted["total"]
    idle_free = counted["active"] - shape.vocab_size * shape.d_model
    assert shape.active_matrix_parameters == pytest.approx(idle_free, rel=2e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_the_decoder_keeps(checkpointing: bool) -> None:
    shape = ModelShape(64, 128, 3, 4, 2, 32, 192, 8, 2)
    one = replace(shape, num_layers=1)
    found = [saved_bytes(decoder(s, activation_checkpointing=checkpointing)) for s in (shape, one)]
    assert found[0] > found[1]
    setups = [Setup(1, "ddp", tokens=512, seq_len=64, checkpointing=checkpointing)] * 2
    costs = [
        simulate_model(s, setup, H200, lambda total: zipf_loads(8, total, 0.0)).activation_bytes
        for s, setup in zip((shape, one), setups, strict=True)
    ]
    assert costs[0] - costs[1] == pytest.approx(found[0] - found[1], rel=0.15)


def saved_bytes(model: Decoder) -> int:
    """Of storages, parameters and their copies apart, that 512 tokens leave for backward."""
    torch.manual_seed(0)
    sizes = {p.numel() for p in model.parameters()} | {p.numel() for p in model.buffers()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().nbytes() // tensor.element_size() not in sizes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(64, (8, 64))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        logits = model(ids).logits
    assert logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_states_by_hand() -> None:
    shape = MODELS["olmoe-1b-7b"]
    total = shape.expert_parameters + shape.other_parameters

    def cost(devices: int, strategy: str, group: int = 1, method: str = "ep"):  # noqa: ANN202
        setup = Setup(devices, strategy, group, method, checkpointing=True)
        return simulate_model(shape, setup, H200, lambda n: hot_loads(64, n, 0.5, 4))

    one, ddp, fsdp = cost(1, "ddp"), cost(64, "ddp"), cost(64, "fsdp")
    assert one.state_bytes == ddp.state_bytes == 16 * total
    assert ddp.working_bytes - one.working_bytes == 4 * total  # buckets
    assert fsdp.state_bytes == round(16 * total / 64)
    ep, llep = cost(64, "fsdp", 8), cost(64, "fsdp", 8, "llep")
    own = 16 * (shape.expert_parameters / 8 + shape.other_parameters / 64)
    assert ep.state_bytes == llep.state_bytes == round(own)
    assert llep.activation_bytes < ep.activation_bytes
    assert llep.seconds < ep.seconds
    for found in (one, ddp, fsdp, ep, llep):
        assert 0 < found.mfu < H200.flops_reached
        assert 0 < found.efficiency <= 1
    assert (one.fits, fsdp.fits) == (False, True)


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (Setup(8, "zero"), "strategy='zero'"),
        (Setup(8, "ddp", group=8), r"strategy=ddp: .*group=8\) needs fsdp"),
        (Setup(8, "fsdp", group=3), "group=3"),
        (Setup(8, "fsdp", group=8, method="x"), "method='x'"),
        (Setup(0), "devices=0"),
    ],
)
def test_bad_setups_are_named(setup: Setup, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        simulate_model(MODELS["quickstart"], setup, H200, lambda n: zipf_loads(8, n, 0.0))
