"""Decoders of ours become checkpoints of transformers, and come back as they were."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from routerlab.backbones.decoder import Decoder
from routerlab.backbones.frozen import train_part
from routerlab.backbones.saved import arguments_of, load_decoder, weights_of
from routerlab.balancers.bip import BIP
from routerlab.balancers.expert_bias import ExpertBias
from routerlab.convert.certificate import Certificate, ConversionFailed
from routerlab.convert.exporting import export_model, verify_export, write_hugging_face
from routerlab.convert.families import FAMILIES, Anatomy, fitting_family
from routerlab.convert.importing import import_model
from routerlab.convert.law import law_of
from routerlab.routers.expert_choice import ExpertChoice
from routerlab.routers.sinkhorn import Sinkhorn
from tests.convert.checkpoints import CHECKPOINTS, edit_tensors, tiny_checkpoint, tiny_decoder
from tests.helpers.language_models import VOCAB, save_tiny, tiny_tokenizer

IDS = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))
RAW = {"normalize_weights": False}
SIGMOID = {"score_fn": "sigmoid", "route_scale": 2.5, "balancer": ExpertBias}
GROUPS = {"num_groups": 2, "groups_per_token": 1}
MIXED = {"num_experts": [4, 0, 4], "dense_d_ff": 20}
DENSE_FIRST = {"num_experts": [0, 4, 4], "dense_d_ff": 20}
# Our routers' knobs, what differs in the decoder, the family that is chosen.
EXPORTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "softmax": ({}, {}, "mixtral"),
    "top-k first": ({"order": "top_k_first"}, {}, "mixtral"),
    "raw softmax": (RAW, {}, "qwen2_moe"),
    "raw softmax, one expert": (RAW | {"top_k": 1}, {}, "qwen2_moe"),
    "dense in between": ({}, MIXED, "qwen2_moe"),
    "shared": ({}, {"num_shared_experts": 2}, "qwen2_moe"),
    "raw, shared, dense": (RAW, {"num_shared_experts": 1} | DENSE_FIRST, "qwen2_moe"),
    "query-key norm": ({}, {"qk_norm": True}, "qwen3_moe"),
    "query-key norm, raw": (RAW, {"qk_norm": True, "tie_embeddings": True}, "qwen3_moe"),
    "query-key norm, dense": ({}, {"qk_norm": True} | MIXED, "qwen3_moe"),
    "sigmoid": ({"score_fn": "sigmoid"}, {}, "glm4_moe"),
    "sigmoid, bias": (SIGMOID, {"qk_norm": True} | DENSE_FIRST, "glm4_moe"),
    "sigmoid, groups": (SIGMOID | GROUPS, {"num_shared_experts": 1}, "glm4_moe"),
    "sigmoid, raw": (SIGMOID | RAW, {"tie_embeddings": True}, "glm4_moe"),
    "softmax, bias": ({"balancer": ExpertBias}, {}, "ernie4_5_moe"),
    "softmax, bias, shared": (
        {"balancer": ExpertBias},
        {"num_shared_experts": 2} | DENSE_FIRST,
        "ernie4_5_moe",
    ),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def of_decoder(name: str) -> tuple[Decoder, str]:
    router, changes, family = EXPORTS[name]
    return tiny_decoder(router, **changes), family


@pytest.mark.parametrize("name", EXPORTS)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    decoder, family = of_decoder(name)
    certificate = export_model(decoder, tmp_path / "theirs", tokenizer=tiny_tokenizer())
    assert (certificate.family, certificate.failures) == (family, [])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert model.config.model_type == family
    assert logits(decoder).std() > 0.3
    torch.testing.assert_close(logits(model), logits(decoder), rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "theirs").get_vocab()
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)
    again = load_decoder(tmp_path / "ours")
    assert arguments_of(again) == arguments_of(decoder)
    before, after = weights_of(decoder), weights_of(again)
    extra = {key for key in after.keys() - before.keys() if key.endswith("balancer.bias")}
    assert after.keys() - extra == before.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(after[key].any() for key in extra)
    torch.testing.assert_close(logits(again), logits(decoder), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_here_and_back_again(name: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(name)
    save_tiny(tmp_path / "theirs", model)
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)
    family = CHECKPOINTS[name][0]
    export_model(load_decoder(tmp_path / "ours"), tmp_path / "again", family)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=0)


def test_the_second_choice_can_be_asked_for(tmp_path: Path) -> None:
    decoder = tiny_decoder(SIGMOID, qk_norm=True)
    certificate = export_model(decoder, tmp_path / "theirs", family="dots1")
    assert (certificate.family, certificate.failures) == ("dots1", [])
    certificate = export_model(tiny_decoder(), tmp_path / "qwen2", family="qwen2_moe")
    assert (certificate.family, certificate.failures) == ("qwen2_moe", [])


@pytest.mark.parametrize(
    ("router", "changes", "family", "why"),
    [
        ({}, {"qk_norm": True, "num_shared_experts": 1}, "auto", "no place for shared experts"),
        ({"route_scale": 2.0}, {}, "auto", "mixtral has no place for route_scale"),
        (SIGMOID, MIXED, "auto", "glm4_moe has no place for dense layers after MoE layers"),
        ({"score_fn": "sigmoid"} | GROUPS, {}, "auto", "groups of experts without a bias"),
        ({"balancer": ExpertBias}, {"qk_norm": True}, "auto", "ernie4_5_moe .* query-key norm"),
        ({}, {"qk_norm": True}, "mixtral", "mixtral has no place for query-key norm"),
        (RAW, {}, "mixtral", "mixtral has no place for weights that do not sum to 1"),
        ({}, {}, "olmoe", "family='olmoe': must be auto or one of qwen3_moe, "),
        ({"eval_capacity_factor": 1.0}, {}, "auto", "eval_capacity_factor=1.0"),
        ({"order": "top_k_first", "noise": True}, {}, "auto", "noise=true"),
        ({"balancer": BIP}, {}, "auto", "balancer BIP: only ExpertBias"),
    ],
)  # fmt: skip
def test_what_theirs_have_not_is_refused_by_name(
    router: dict[str, Any], changes: dict[str, Any], family: str, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=why):
        export_model(tiny_decoder(router, **changes), tmp_path / "theirs", family)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("router", [partial(ExpertChoice, capacity_factor=1.0), Sinkhorn])
def test_other_routers_are_refused_by_name(router: Any, tmp_path: Path) -> None:
    name = getattr(router, "func", router).__name__
    with pytest.raises(ValueError, match=f"router {name}: no class of transformers"):
        export_model(tiny_decoder(make=router), tmp_path / "theirs")


def test_layers_that_differ_are_refused(tmp_path: Path) -> None:
    decoder = tiny_decoder()
    decoder.moe_layers["layers.01.moe"].router.top_k = 1
    with pytest.raises(ValueError, match="differ between layers: layers.00.moe has .*top_k=2"):
        export_model(decoder, tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"numbers of experts that differ .*\[2, 4\]"):
        export_model(tiny_decoder(num_experts=[4, 2, 4]), tmp_path / "theirs")


def test_what_is_of_training_alone_is_noted(tmp_path: Path) -> None:
    decoder = tiny_decoder({"jitter_eps": 0.01, "capacity_factor": 1.25})
    certificate = export_model(decoder, tmp_path / "theirs")
    assert certificate.failures == []
    assert certificate.notes == [
        "jitter_eps=0.01, capacity_factor=1.25: of training alone, has no place in mixtral"
    ]


def swap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two experts of layer 1 change places."""
    first, second = (f"model.layers.1.mlp.experts.{e}." for e in (0, 2))
    other = {k: k.replace(first, second) for k in tensors if first in k}
    other |= {k: k.replace(second, first) for k in tensors if second in k}
    return {key: tensors[other.get(key, key)].clone() for key in tensors}


def lose(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: t for k, t in tensors.items() if ".1.mlp.experts.3." not in k}


def turn(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gate's rows of layer 1 change places: other experts are used."""
    key = "model.layers.1.mlp.gate.weight"
    return tensors | {key: tensors[key].flip(0).contiguous()}


def narrow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    return tensors | {key: tensors[key][1:].clone()}


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda t: t, None),
        (swap, "layer 1: hidden states differ"),
        (turn, "layer 1: .*tokens use other experts"),
        (lose, "target tensors missing: model.layers.1.mlp.experts.3"),
        (lambda t: t | {"model.extra": torch.ones(2)}, "target tensors not written: model.extra"),
        (lambda t: t | {"model.norm.weight": torch.full((16,), torch.nan)}, "logits differ by nan"),
        (lambda t: t | {"model.norm.weight": torch.ones(17)}, "mismatched_keys: .*model.norm"),
        (narrow, "transformers cannot read it: "),
    ],
)  # fmt: skip
def test_what_was_written_is_read_again(edit: Any, why: str | None, tmp_path: Path) -> None:
    decoder = tiny_decoder(qk_norm=True)
    law, _ = law_of(decoder)
    anatomy = Anatomy(arguments_of(decoder), law)
    certificate = Certificate("export", "decoder", "theirs", "qwen3_moe")
    write_hugging_face(tmp_path, decoder, anatomy, FAMILIES["qwen3_moe"], certificate)
    edit_tensors(tmp_path, edit)
    if why is None:
        verify_export(tmp_path, decoder, certificate)
        assert certificate.failures == []
        return
    with pytest.raises(ConversionFailed, match=why):
        verify_export(tmp_path, decoder, certificate)


def test_the_first_family_that_fits_is_chosen() -> None:
    anatomy = Anatomy(arguments_of(tiny_decoder()), law_of(tiny_decoder())[0])
    assert fitting_family(anatomy).name == "mixtral"
    assert fitting_family(anatomy, "qwen2_moe").name == "qwen2_moe"


def test_frozen_parts_are_exported_too(tmp_path: Path) -> None:
    decoder = tiny_decoder()
    train_part(decoder, "routers", 1)
    assert len(decoder.state_dict()) < len(weights_of(decoder))
    certificate = export_model(decoder, tmp_path / "theirs")
    assert certificate.failures == []
