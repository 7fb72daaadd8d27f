"""Wrapped mixtures of transformers: their records, padding, checkpointing, generation."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, StaticCache
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from routerlab.backbones.decoder import BackboneOutput
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.test_time.plug_in import edited
from tests.helpers.language_models import POSITIONS, VOCAB
from tests.helpers.moe_models import (
    EXPERTS,
    FAMILIES,
    SIGMOID,
    TOP_K,
    WIDTH,
    gates,
    heard,
    ragged,
    routed_layers,
    same_records,
    some_ids,
    stirred,
    tiny_config,
    tiny_moe,
    wrapped,
)


def assert_record(record: RouterOutput, theirs: tuple[Tensor, Tensor, Tensor], family: str) -> None:
    logits, weights, experts = theirs
    scores = logits.sigmoid() if family in SIGMOID else logits.softmax(-1)
    torch.testing.assert_close(record.router_probs, scores / scores.sum(-1, keepdim=True))
    assert torch.equal(record.router_logits, logits)
    assert torch.equal(record.expert_indices.view(-1, TOP_K), experts)
    assert torch.equal(record.combine_weights.view(-1, TOP_K), weights)
    assert (record.top_k, int(record.num_dropped)) == (TOP_K, 0)


# -- outputs and records --------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_model_of_transformers_with_records(family: str, experts: str) -> None:
    model, plain, ids = (
        wrapped(family, experts_implementation=experts),
        tiny_moe(family),
        some_ids(),
    )
    plain.set_experts_implementation(experts)
    found = heard(plain)
    out = model(ids)
    assert isinstance(out, BackboneOutput)
    assert torch.equal(out.logits, plain(ids).logits)
    assert list(out.router_outputs) == model.layer_names == routed_layers(family)
    for record, theirs in zip(out.router_outputs.values(), found, strict=True):
        assert_record(record, theirs, family)
    assert (model.vocab_size, model.max_positions, model.tokenizer) == (VOCAB, POSITIONS, None)
    layer = model.moe_layers[model.layer_names[0]]
    assert (layer.router.num_experts, layer.router.top_k, layer.experts.num_experts) == (8, 2, 8)
    assert layer.router.gate.weight.shape == (EXPERTS, WIDTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_outputs_are_those_of_transformers_too(family: str) -> None:
    config, ids = tiny_config(family), some_ids()
    torch.manual_seed(0)
    plain = stirred(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    model = wrapped(family, dtype="bfloat16", trainable="none")
    out, expected = model(ids), plain(ids).logits
    assert torch.equal(out.logits, expected)
    assert out.router_outputs[model.layer_names[0]].router_logits.dtype == torch.float32
    with edited(model, lambda name, logits: logits + 0):
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_on_records_has_the_gradient_of_the_logits(family: str) -> None:
    model, plain, ids = wrapped(family), tiny_moe(family), some_ids()
    found = heard(plain)
    plain(ids)
    sum(logits.logsumexp(-1).square().mean() for logits, _, _ in found).backward()  # type: ignore[union-attr]
    records = model(ids).router_outputs.values()
    sum(r.router_logits.logsumexp(-1).square().mean() for r in records).backward()  # type: ignore[union-attr]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    assert all(gate.weight.grad.norm() > 0 for gate in gates(model))


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_balancing_loss_is_the_family_s_over_k(family: str) -> None:
    model, (ids, context) = wrapped(family), ragged(left=False)
    records = model(ids, context).router_outputs
    mask = context.valid.view(3, 9).long()  # type: ignore[union-attr]
    for record in records.values():
        theirs = load_balancing_loss_func((record.router_logits,), EXPERTS, TOP_K, mask)
        ours = LoadBalancingLoss(weight=1.0)(record, context)
        torch.testing.assert_close(ours * TOP_K, theirs)


def test_no_loss_of_transformers_is_added() -> None:
    model, ids = wrapped("olmoe", changes={"output_router_logits": True}), some_ids()
    plain = model.model(input_ids=ids, labels=ids)
    logits = plain.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(plain.loss, F.cross_entropy(logits, ids[:, 1:].flatten()))


# -- padding and positions ------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_and_leaves_the_records(family: str, left: bool) -> None:
    model, (ids, context) = wrapped(family), ragged(left)
    valid = context.valid.view(3, 9)  # type: ignore[union-attr]
    out = model(ids, context)
    alone = [model(row[real][None]) for row, real in zip(ids, valid, strict=True)]
    expected = torch.cat([one.logits[0] for one in alone])
    torch.testing.assert_close(out.logits[valid], expected, rtol=1e-4, atol=1e-5)
    for name, record in out.router_outputs.items():
        parts = [one.router_outputs[name] for one in alone]
        logits = torch.cat([part.router_logits for part in parts])
        torch.testing.assert_close(
            record.without_padding(record.router_logits), logits, rtol=1e-4, atol=1e-5
        )
        assert torch.equal(
            record.expert_indices, torch.cat([part.expert_indices for part in parts])
        )
        assert (
            record.token_indices.unique().tolist() == valid.flatten().nonzero().flatten().tolist()
        )


def test_kept_positions_are_the_last() -> None:
    model, ids = wrapped("glm4_moe"), some_ids()
    full, kept = model(ids).logits, model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(kept, full[:, -2:], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=f"longer than max_positions={POSITIONS}"):
        model(torch.zeros(1, POSITIONS + 1, dtype=torch.long))


# -- checkpointing --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_equal_gradients_and_single_records(family: str) -> None:
    (ids, context), found = ragged(left=True), []
    for checkpointing in (False, True):
        model = wrapped(family, activation_checkpointing=checkpointing).train()
        out = model(ids, context)
        records = out.router_outputs
        loss = out.logits.square().mean()
        loss = loss + sum(r.router_probs.square().mean() for r in records.values())
        before = list(records)
        loss.backward()
        assert list(records) == before == list(model.records)
        found.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_reentrant_checkpointing_is_refused() -> None:
    model = wrapped("olmoe").train()
    model.model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=True: the records of routers"):
        model(some_ids())


# -- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_leaves_the_records_of_its_last_token(family: str) -> None:
    model, (ids, context) = wrapped(family), ragged(left=True)
    mask = context.valid.view(3, 9).long()  # type: ignore[union-attr]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    written = model.model.generate(ids, attention_mask=mask, **options)
    got = model.records
    valid = F.pad(mask, (0, 2), value=1).bool().flatten()
    full = model(written[:, :-1], RoutingContext(3, 11, valid=valid)).router_outputs
    for name, record in got.items():
        assert record.router_logits.shape == (3, EXPERTS)
        last = full[name].router_logits.view(3, 11, -1)[:, -1]
        torch.testing.assert_close(record.router_logits, last, rtol=1e-4, atol=1e-5)


def test_the_records_of_a_prefill_know_its_padding() -> None:
    model, (ids, context) = wrapped("olmoe"), ragged(left=True)
    expected = model(ids, context).router_outputs
    mask = context.valid.view(3, 9).long()  # type: ignore[union-attr]
    static = StaticCache(config=model.model.config, max_cache_len=16)
    for cache in (None, static):
        options = {} if cache is None else {"past_key_values": cache}
        model.model.generate(ids, attention_mask=mask, max_new_tokens=1, **options)
        same_records(model.records, expected)


def test_beams_are_rows_of_the_records() -> None:
    model, ids = wrapped("mixtral"), some_ids(2)
    model.model.generate(ids, max_new_tokens=2, num_beams=3, do_sample=False)
    assert [len(record.router_logits) for record in model.records.values()] == [6, 6, 6]
