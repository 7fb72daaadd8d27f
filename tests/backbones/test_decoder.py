"""The decoder: causality, recomputation, names, sizes and mistakes."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.backbones.attention import rotary_tables, rotate
from routerlab.backbones.decoder import BackboneOutput, Decoder
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.token_choice import TokenChoice
from tests.helpers.models import EXPERTS, LENGTH, VOCAB, WIDTH, tiny_batch, tiny_decoder


def test_output() -> None:
    decoder, ids = tiny_decoder(), tiny_batch(3)["input_ids"]
    out = decoder(ids)
    assert isinstance(out, BackboneOutput)
    assert out.logits.shape == (3, LENGTH, VOCAB)
    assert list(out.router_outputs) == ["layers.00.moe", "layers.01.moe"]
    for record in out.router_outputs.values():
        assert record.tokens_per_expert.sum() == 3 * LENGTH * 2


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": True, "num_kv_heads": 2}, {"num_shared_experts": 1, "num_layers": 1}],
)
def test_the_future_and_other_samples_do_not_reach_a_token(changes: dict[str, Any]) -> None:
    decoder, ids = tiny_decoder(**changes), tiny_batch(2)["input_ids"]
    plain = decoder(ids).logits
    for changed in range(LENGTH):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % VOCAB
        logits = decoder(other).logits
        torch.testing.assert_close(logits[0, :changed], plain[0, :changed], rtol=0, atol=1e-12)
        torch.testing.assert_close(logits[1], plain[1], rtol=0, atol=1e-12)
        assert (logits[0, changed:] - plain[0, changed:]).abs().amax(-1).min() > 1e-9


def test_a_router_that_looks_ahead_leaks() -> None:
    # the test above can fail: with capacity, K=2, a later token can take an earlier one's slot
    router = partial(TokenChoice, top_k=2, init_std=1.0, capacity_factor=0.5)
    decoder, ids = tiny_decoder(router=router), tiny_batch(4)["input_ids"]
    assert not decoder.layers[0].moe.router.causal_training
    plain, moved = decoder(ids).logits, []
    for token in range(VOCAB):
        other = ids.clone()
        other[:, -1] = token
        moved.append((decoder(other).logits - plain)[:, :-1].abs().max().item())
    assert max(moved) > 1e-6


def test_padding_is_not_routed_and_changes_nothing_before_it() -> None:
    decoder, batch = tiny_decoder(), tiny_batch(4)
    valid = batch["valid"]
    out = decoder(batch["input_ids"], RoutingContext(4, LENGTH, valid=valid.flatten()))
    for record in out.router_outputs.values():
        assert record.tokens_per_expert.sum() == 2 * valid.sum()
    alone = decoder(batch["input_ids"][:1, : int(valid[0].sum())])
    torch.testing.assert_close(out.logits[:1, : int(valid[0].sum())], alone.logits)


@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_recomputation_changes_nothing(jitter: float) -> None:
    router = partial(TokenChoice, top_k=2, init_std=1.0, jitter_eps=jitter)
    batch, results = tiny_batch(3), []
    context = RoutingContext(3, LENGTH, valid=batch["valid"].flatten(), seed=4)
    for recompute in (False, True):
        decoder = tiny_decoder(router=router, activation_checkpointing=recompute)
        out = decoder(batch["input_ids"], context)
        loss = out.logits.square().sum()
        loss = loss + sum(r.router_logits.square().sum() for r in out.router_outputs.values())
        loss.backward()
        counts = [r.tokens_per_expert for r in out.router_outputs.values()]
        gradients = {name: p.grad for name, p in decoder.named_parameters()}
        results.append({"loss": loss.detach(), "counts": counts} | gradients)
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert results[0]["layers.0.moe.router.gate.weight"].abs().max() > 1e-3


def test_each_block_runs_twice_under_recomputation_and_once_without_gradients() -> None:
    decoder, calls = tiny_decoder(activation_checkpointing=True), []
    decoder.layers[0].moe.router.register_forward_hook(lambda *_: calls.append(1))
    out = decoder(tiny_batch(2)["input_ids"])
    assert len(calls) == 1
    out.logits.sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        decoder(tiny_batch(2)["input_ids"])
    assert len(calls) == 3


@pytest.mark.parametrize("num_layers", [2, 12, 101])
def test_layer_names_sort_by_depth(num_layers: int) -> None:
    decoder = tiny_decoder(num_layers=num_layers, d_model=2, num_heads=1)
    assert decoder.layer_names == sorted(decoder.layer_names)
    assert len(set(decoder.layer_names)) == num_layers
    out = decoder(torch.zeros(1, 2, dtype=torch.long))
    assert list(out.router_outputs) == decoder.layer_names


def test_each_layer_gets_its_number() -> None:
    decoder, seen = tiny_decoder(num_layers=3), []
    for block in decoder.layers:
        block.moe.router.register_forward_pre_hook(lambda _, args: seen.append(args[1].layer))
    decoder(tiny_batch(2)["input_ids"])
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("tie", [False, True])
def test_count_parameters_by_hand(tie: bool) -> None:
    decoder = tiny_decoder(num_shared_experts=1, qk_norm=True, tie_embeddings=tie)
    # D 8, V 11, H 2, head 4, one kv head, F 6, E 4, K 2, L 2
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 2 * 4  # q, k and v, o, q_norm and k_norm: 200
    expert = 3 * 6 * 8  # 144
    rest = attention + expert + EXPERTS * WIDTH + 2 * WIDTH  # + shared expert, gate, two norms: 392
    head = (1 if tie else 2) * VOCAB * WIDTH + WIDTH  # + the last norm
    expected = {"total": head + 2 * (rest + 4 * expert), "active": head + 2 * (rest + 2 * expert)}
    expected |= {"trainable": expected["total"], "experts": 2 * EXPERTS}
    assert decoder.count_parameters() == expected


def test_count_parameters_without_a_fixed_top_k() -> None:
    decoder = tiny_decoder()
    for block in decoder.layers:
        del block.moe.router.top_k
    counts = decoder.count_parameters()
    assert counts["active"] == counts["total"]


def test_tied_head_is_one_parameter() -> None:
    decoder = tiny_decoder(tie_embeddings=True)
    assert decoder.embed_tokens.weight is decoder.lm_head.weight


def test_residual_branches_shrink_with_depth() -> None:
    # std of a branch's last weight: its own times 1 / sqrt(2 L), for attention and both experts
    decoder = Decoder(
        partial(TokenChoice, top_k=2), vocab_size=8, d_model=64, num_layers=8, num_heads=2,
        num_kv_heads=2, d_ff=64, num_experts=2, max_positions=4, num_shared_experts=1,
    )  # fmt: skip
    block: Any = decoder.layers[3]
    weights = [block.self_attn.o_proj.weight, block.moe.experts.down_proj]
    weights.append(block.moe.shared_experts.down_proj.weight)
    for weight in weights:  # 4096 numbers or more: 1 / sqrt(2 * 4096) = 1.1 % standard error
        assert float(weight.detach().std()) == pytest.approx(64**-0.5 / math.sqrt(16), rel=0.06)
    assert float(block.self_attn.v_proj.weight.detach().std()) == pytest.approx(1 / 8, rel=0.06)


def test_rotary_scores_depend_on_distance_only() -> None:
    cos, sin = (t.double() for t in rotary_tables(12, 4, 100.0))
    q, k = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def at(vector: Tensor) -> Tensor:
        return rotate(vector.expand(1, 1, 12, 4), cos, sin)[0, 0]

    scores = at(q) @ at(k).T
    for distance in range(-3, 4):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-6)
    assert (scores[0, :4] - scores[0, 0]).abs()[1:].min() > 1e-6
    torch.testing.assert_close(at(q).norm(dim=-1), q.norm().expand(12), rtol=1e-6, atol=0)


def test_a_sequence_that_is_too_long() -> None:
    with pytest.raises(ValueError, match=r"sequence of 17 tokens.*max_positions=16"):
        tiny_decoder()(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, r"d_model=8: must be a multiple of num_heads=3"),
        ({"num_heads": 0}, r"d_model=8: must be a multiple of num_heads=0"),
        ({"num_heads": 8}, r"d_model=8 / num_heads=8: heads must have an even width"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_kv_heads=3: must divide num_heads=4"),
        ({"num_kv_heads": 0}, r"num_kv_heads=0: must divide num_heads=2"),
    ],
)
def test_widths_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_decoder(**changes)


def test_routers_know_the_token_ids() -> None:
    seen = []

    class Watching(TokenChoice):
        def forward(self, x: Tensor, context: RoutingContext | None = None) -> RouterOutput:
            seen.append(context.token_ids)
            return super().forward(x, context)

    decoder, ids = tiny_decoder(router=Watching), tiny_batch(3)["input_ids"]
    decoder(ids)
    decoder(ids, RoutingContext(3, LENGTH))
    assert len(seen) == 4
    assert all(torch.equal(tokens, ids.flatten()) for tokens in seen)


def test_layers_may_differ_in_their_experts() -> None:
    decoder = tiny_decoder(num_experts=[2, 5])
    records = decoder(tiny_batch(3)["input_ids"]).router_outputs
    assert [record.num_experts for record in records.values()] == [2, 5]
    assert decoder.count_parameters()["experts"] == 7
    with pytest.raises(ValueError, match=r"num_experts=\[2, 5, 3\]: one number for each of"):
        tiny_decoder(num_experts=[2, 5, 3])
