"""Wrapped mixtures of transformers: edits of their logits, their parts, their directories."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from routerlab.backbones.hugging_face import HuggingFaceMoE
from routerlab.backbones.hugging_face_laws import law_of
from routerlab.test_time.plug_in import edited
from tests.helpers.language_models import save_tiny
from tests.helpers.moe_models import (
    EXPERTS,
    FAMILIES,
    SIGMOID,
    TOP_K,
    WIDTH,
    gates,
    same_records,
    some_ids,
    tiny_moe,
    wrapped,
)

# -- edits of the logits --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_edited_logits_are_chosen_from_by_the_family_s_law(family: str) -> None:
    model, plain, ids = wrapped(family), tiny_moe(family), some_ids()
    shift = torch.randn(ids.numel(), EXPERTS)
    expected = plain(ids).logits
    with edited(model, lambda name, logits: logits + 0):
        assert torch.equal(model(ids).logits, expected)
    with edited(model, lambda name, logits: logits + shift):
        out = model(ids)
    for gate in gates(plain):
        gate.register_forward_hook(
            lambda gate, args, out: chosen_by_hand(gate, out[0] + shift, family)
        )
    torch.testing.assert_close(out.logits, plain(ids).logits)
    assert (out.logits - expected).abs().max() > 1e-2
    assert torch.equal(model(ids).logits, expected)  # nothing is left


def chosen_by_hand(gate: Any, logits: Tensor, family: str) -> tuple[Tensor, Tensor, Tensor]:
    """The choice from given logits, token by token."""
    weights, experts = [], []
    for row in logits:
        if family in SIGMOID:
            scores = row.sigmoid()
            ranked = scores + gate.e_score_correction_bias
            groups = ranked.view(gate.num_group, -1)
            best = groups.topk(2, dim=-1).values.sum(-1).topk(gate.topk_group).indices
            outside = torch.ones(gate.num_group, dtype=torch.bool).index_fill(0, best, False)
            ranked = groups.masked_fill(outside[:, None], -torch.inf).flatten()
            chosen = ranked.topk(TOP_K).indices
            weight = scores[chosen] / scores[chosen].sum() * gate.routed_scaling_factor
        else:
            chosen = row.topk(TOP_K).indices
            plain = family in ("olmoe", "qwen2_moe")
            weight = row.softmax(-1)[chosen] if plain else row[chosen].softmax(-1)
        weights.append(weight)
        experts.append(chosen)
    return logits, torch.stack(weights), torch.stack(experts)


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_have_the_gradient_of_finite_differences(family: str) -> None:
    model, ids = wrapped(family, trainable="none"), some_ids(2, 4)
    name = model.layer_names[-1]
    shift = torch.zeros(8, EXPERTS, requires_grad=True)

    def loss(delta: Tensor) -> Tensor:
        with edited(model, lambda layer, logits: logits + delta, [name]):
            return model(ids).logits.double().square().mean()

    gradient = torch.autograd.grad(loss(shift), shift)[0]
    chosen = model.records[name].expert_indices.view(8, TOP_K)
    for token in (0, 5):  # the first pick of two tokens: no other comes in for so small a step
        step = torch.zeros_like(shift).index_put_(
            (torch.tensor(token), chosen[token, 0]), torch.tensor(1e-2)
        )
        with torch.no_grad():
            found = float(loss(shift + step) - loss(shift - step)) / 2e-2
        wanted = float(gradient[token, chosen[token, 0]])
        assert abs(found - wanted) <= 0.02 * float(gradient.abs().max())


def test_edits_reach_generation() -> None:
    model, ids = wrapped("mixtral"), some_ids()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}

    def force(name: str, logits: Tensor) -> Tensor:
        return logits + torch.tensor([20.0, 20.0] + [0.0] * 6)

    with edited(model, force):
        written = model.model.generate(ids, **options)
        assert all(set(r.expert_indices.tolist()) == {0, 1} for r in model.records.values())
        full = model(written[:, :-1]).logits[:, -4:].argmax(-1)
    assert torch.equal(full, written[:, -4:])
    assert not torch.equal(written, model.model.generate(ids, **options))


# -- copies, sizes and parts ----------------------------------------------------------------------


def test_a_copy_keeps_its_own_records() -> None:
    model, ids = wrapped("qwen3_moe"), some_ids()
    records = model(ids).router_outputs
    twin = copy.deepcopy(model)
    assert twin.records == {}
    same_records(twin(ids[:1]).router_outputs, model(ids[:1]).router_outputs)
    twin.moe_layers[twin.layer_names[0]].router.gate.weight.data.zero_()
    same_records(model(ids).router_outputs, records)


def test_parameters_are_counted() -> None:
    model = wrapped("gpt_oss", trainable="routers", trainable_layers=2)
    counts, plain = model.count_parameters(), tiny_moe("gpt_oss")
    stacked = sum(p.numel() for n, p in plain.named_parameters() if ".experts." in n)
    assert counts["total"] == plain.num_parameters()
    assert counts["active"] == counts["total"] - stacked * (EXPERTS - TOP_K) // EXPERTS
    assert counts["trainable"] == 2 * (EXPERTS * WIDTH + EXPERTS)
    assert counts["experts"] == 3 * EXPERTS


def test_routers_alone_learn_and_are_the_state() -> None:
    model = wrapped("deepseek_v3", trainable="routers", trainable_layers=[2])
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"model.model.layers.2.mlp.gate.weight"}
    parts = ("weight", "e_score_correction_bias")
    assert set(model.state_dict()) == {
        f"model.model.layers.{layer}.mlp.gate.{part}" for layer in (1, 2) for part in parts
    }
    model(some_ids()).router_outputs["layers.02.moe"].router_probs.square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == names


def test_routers_that_train_are_in_float32() -> None:
    model, ids = (
        wrapped("olmoe", dtype="bfloat16", trainable="routers", trainable_layers=1),
        some_ids(),
    )
    dtypes = [gate.weight.dtype for gate in gates(model)]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
    out = model(ids)
    assert out.logits.dtype == torch.bfloat16
    plain = wrapped("olmoe", dtype="bfloat16", trainable="none")(ids).logits
    torch.testing.assert_close(out.logits, plain, rtol=0.1, atol=0.1)
    out.logits.float().square().mean().backward()
    gate = gates(model)[2]
    assert gate.weight.grad.dtype == torch.float32
    assert gate.weight.grad.norm() > 0


# -- directories ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_a_saved_model_is_an_ordinary_directory(family: str, tmp_path: Path) -> None:
    base, ids = save_tiny(tmp_path / "base", tiny_moe(family)), some_ids()
    model = HuggingFaceMoE(str(base), tmp_path, trainable="routers")
    assert model.tokenizer("a").input_ids == [3]
    assert torch.equal(model(ids).logits, tiny_moe(family)(ids).logits)
    with torch.no_grad():
        for layer in model.moe_layers.values():
            layer.router.gate.weight.mul_(1.5)
    model.save_model(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not torch.equal(again(ids).logits, tiny_moe(family)(ids).logits)
    shapes = {n: p.shape for n, p in again.state_dict().items()}
    assert shapes == {n: p.shape for n, p in tiny_moe(family).state_dict().items()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "no mixture of experts; make one with `routerlab upcycle`"),
        ({"model_type": "jetmoe"}, "Looked for blocks with `experts`.*found JetMoe"),
        ({"hidden_size": 32}, "must have model_type"),
    ],
)
def test_other_models_are_refused(config: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 32}
    with pytest.raises(ValueError, match=message):
        HuggingFaceMoE(config=sizes | config)


def test_a_router_of_an_unknown_law_is_refused() -> None:
    class OddTopKRouter(torch.nn.Linear):
        top_k = 2

        def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = super().forward(input)
            values, experts = logits.topk(2)
            return logits, values.sigmoid(), experts

    with pytest.raises(
        ValueError, match="here: OddTopKRouter is of no family.*top-k of biased sigmoids$"
    ):
        law_of(OddTopKRouter(8, 4), "here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"dtype": "bfloat16"}, "trainable=all: dtype=bfloat16 would lose small updates"),
        ({"experts_implementation": "routerlab"}, "experts_implementation='routerlab'"),
        ({"trainable": "routers", "trainable_layers": 9}, "trainable_layers=9: must be from 1 to"),
        ({"path": "x"}, "path='x': must be given, or a config instead"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped("olmoe", **options)
