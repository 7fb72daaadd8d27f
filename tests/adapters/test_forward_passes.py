"""Forward passes as training makes them: padding, recomputation, autocast, compilation."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from routerlab.core.routing import RoutingContext
from tests.adapters.forms import (
    FORMS,
    TASKS,
    adapted,
    config_of,
    gradients,
    logits_of,
    run,
    some_ids,
    stir,
)
from tests.helpers.language_models import tiny_gpt2, tiny_llama

ROUTED = {**FORMS, "remix": {"router": "subset_sampling", "top_k": 2}}
SAMPLING: dict[str, dict[str, Any]] = {
    "token": {"router": "subset_sampling", "top_k": 2},
    "sequence": {"router": "subset_sampling", "top_k": 2, "granularity": "sequence"},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", FORMS)
def test_padding_is_never_routed_and_changes_nothing(form: str, side: str) -> None:
    model, ids = adapted(form), some_ids(3, 6)
    lengths = [6, 3, 1]
    rows = [ids[row, :length] for row, length in enumerate(lengths)]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    padded = torch.ones_like(ids)
    padded[mask] = torch.cat(rows)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    got = logits_of(model, padded, attention_mask=mask.long(), position_ids=positions)[mask]
    records = dict(model.base_model.state.records)
    alone, counts = [], dict.fromkeys(records, 0)
    for row, tokens in enumerate(rows):
        with model.base_model.state.tasks(torch.tensor([row % TASKS])), torch.no_grad():
            alone.append(model(tokens[None]).logits[0])
        for name, record in model.base_model.state.records.items():
            counts[name] = counts[name] + record.tokens_per_expert
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-5, atol=1e-5)
    for name, record in records.items():
        assert record.valid is not None
        assert torch.equal(record.valid, mask.flatten())
        assert mask.flatten()[record.token_indices].all()
        assert torch.equal(record.tokens_per_expert, counts[name])


def training_step(model: Any, seed: int, ids: torch.Tensor | None = None) -> torch.Tensor:
    """A loss that reaches experts and routers, of a pass with choices and dropout of this seed."""
    ids = some_ids() if ids is None else ids
    context = RoutingContext(len(ids), ids.shape[1], seed=seed, task_ids=torch.arange(len(ids)))
    model.base_model.state.context = context
    loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    log_probs = [r.log_prob for r in model.base_model.state.records.values()]
    return loss + sum(0.1 * p.sum() for p in log_probs if p is not None)


def _trainable(form: str, **changes: Any) -> Any:
    options = {} if form in ("skills", "remix") else {"lora_dropout": 0.3}
    name = "lora" if form in ("remix", *SAMPLING) else form
    return adapted(name, **ROUTED.get(form, SAMPLING.get(form)) | options | changes).train()


def _checkpointed(model: Any) -> Any:
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("form", [*ROUTED, "sequence"])
def test_recomputed_layers_decide_as_before(form: str) -> None:
    wanted, records = [], []
    for recompute in (False, True):
        model = _trainable(form)
        if recompute:
            _checkpointed(model)
        loss = training_step(model, seed=3)
        before = dict(model.base_model.state.records)
        loss.backward()
        assert model.base_model.state.records == before  # the same objects: none added or replaced
        wanted.append(gradients(model))
        records.append(before)
    plain, recomputed = wanted
    assert plain.keys() == recomputed.keys()
    assert any("mix_experts" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-8)
    for name, record in records[0].items():
        assert torch.equal(record.expert_indices, records[1][name].expert_indices)


@pytest.mark.parametrize("scope", ["linear", "block"])
@pytest.mark.parametrize("form", ["remix", "sequence"])
def test_two_passes_before_their_backward_passes(form: str, scope: str) -> None:
    sums = []
    for recompute in (False, True):
        model = _trainable(form, router_scope=scope)
        if recompute:
            _checkpointed(model)
        first, second = training_step(model, 1), training_step(model, 2, some_ids(2, 4))
        model.eval()(some_ids(1, 3))  # a third one, of another shape
        model.train()
        second.backward()
        first.backward()
        sums.append(gradients(model))
    for name, gradient in sums[0].items():
        torch.testing.assert_close(sums[1][name], gradient, rtol=1e-6, atol=1e-8)


def test_other_draws_would_show() -> None:
    model = _trainable("remix")
    training_step(model, 1).backward()
    first = gradients(model)
    model.zero_grad()
    training_step(model, 2).backward()
    assert any(not torch.allclose(first[n], g, rtol=1e-2) for n, g in gradients(model).items())


@pytest.mark.parametrize("form", [*FORMS, "remix"])
def test_autocast_keeps_router_logits_in_float32(form: str) -> None:
    options = ROUTED[form]
    model = adapted("lora" if form == "remix" else form, **options)
    ids, state = some_ids(), model.base_model.state
    want = logits_of(model, ids)
    exact = dict(state.records)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(g.isfinite().all() for g in gradients(model).values())
    first = next(iter(state.records), None)
    for name, record in state.records.items():
        assert record.router_logits.dtype == torch.float32
        assert record.router_probs.dtype == torch.float32
        if name == first:  # later ones read what other experts have made
            close = {"rtol": 0.02, "atol": 0.02}
            torch.testing.assert_close(record.router_probs, exact[name].router_probs, **close)
    if form in ("shared_a", "core", "skills", "plain"):  # nothing is chosen, so nothing can flip
        error = (out.logits.float() - want).norm() / want.norm()
        assert error < 0.05


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_block_has_one_router(make: Any) -> None:
    targets = ["q_proj", "v_proj", "up_proj", "down_proj", "c_attn", "c_fc", "mlp.c_proj"]
    targets = [t for t in targets if any(n.endswith(t) for n, _ in make().named_modules())]
    model = adapted("lora", make(), router_scope="block", target_modules=targets)
    state, ids = model.base_model.state, some_ids()
    logits_of(model, ids)
    blocks = {layer.block for layer in state.layers.values()}
    assert len(blocks) == 4  # attention and feed-forward network of two layers
    assert len(state.records) == 4
    owners = [layer for layer in state.layers.values() if layer.router is not None]
    assert {layer.block for layer in owners} == blocks
    assert {layer.name for layer in owners} == set(state.records)
    for layer in state.layers.values():  # the second of a block takes the record of the first
        owner = next(o for o in owners if o.block == layer.block)
        state.block_records = {layer.block: state.records[owner.name]}
        told = layer.route("default", torch.zeros(21, layer.in_features), RoutingContext(3, 7))
        assert told is state.records[owner.name]


def test_a_block_whose_router_would_run_late_is_refused() -> None:
    base = tiny_llama()
    for layer in base.model.layers:  # registered in another order than it runs
        layer.mlp.gate_proj, down = layer.mlp.down_proj, layer.mlp.gate_proj
        del layer.mlp.gate_proj, layer.mlp.up_proj
        layer.mlp.up_proj, layer.mlp.gate_proj = torch.nn.Linear(32, 48), down
    targets = ["up_proj", "gate_proj"]
    config = config_of("lora", router_scope="block", target_modules=targets)
    model = stir(get_peft_model(base, config))
    with pytest.raises(ValueError, match="runs before the first linear of layers.00.mlp"):
        model(some_ids())


def test_a_context_of_the_callers_is_used_once_and_completed() -> None:
    model, ids = adapted("lora", router="hash"), some_ids()
    want = logits_of(model, ids)
    state = model.base_model.state
    state.context = RoutingContext(3, 7)
    assert torch.equal(model(ids).logits, want)  # token ids were filled in
    state.context = RoutingContext(3, 7, token_ids=torch.zeros(21, dtype=torch.long))
    assert not torch.equal(model(ids).logits, want)
    assert torch.equal(model(ids).logits, want)
    state.context = RoutingContext(2, 7)
    with pytest.raises(ValueError, match="sees 21 tokens, the batch has 2 x 7"):
        model(ids)
    assert torch.equal(model(ids).logits, want)  # the failure left nothing behind


def test_a_layer_alone_is_refused() -> None:
    model = adapted()
    layer = model.base_model.state.layers["layers.00.mlp.up_proj"]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layers.00.mlp.up_proj: called outside its model"):
            layer(torch.zeros(3, 7, 32))
        model(some_ids())  # and afterwards still


def test_embeddings_are_as_good_as_ids() -> None:
    model, ids = adapted("lora"), some_ids()
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    with pytest.raises(ValueError, match="without input_ids or inputs_embeds"):
        model()


def test_labels_say_where_the_prompt_ends() -> None:
    model = adapted(router="subset_sampling", top_k=2, granularity="sequence")
    ids = some_ids(2, 6)
    labels = ids.clone()
    labels[:, :4] = -100
    model(input_ids=ids, labels=labels)
    of_prompt = {n: r.router_logits[0] for n, r in model.base_model.state.records.items()}
    model(ids[:, :4])
    first = next(iter(of_prompt))
    logits = model.base_model.state.records[first].router_logits[0]
    torch.testing.assert_close(of_prompt[first], logits)
