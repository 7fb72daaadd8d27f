"""Checkpoints of transformers become decoders of ours, or are refused for what they have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from routerlab.backbones.saved import load_decoder
from routerlab.convert.certificate import ConversionFailed
from routerlab.convert.importing import import_model
from tests.convert.checkpoints import (
    CHECKPOINTS,
    EXPERTS,
    edit_tensors,
    stacked_tensors,
    tiny_checkpoint,
)
from tests.helpers.language_models import VOCAB, save_tiny, tiny_tokenizer
from tests.helpers.moe_models import tiny_moe

IDS = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_picks_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(name)
    save_tiny(tmp_path / "theirs", model)
    certificate = import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)
    decoder = load_decoder(tmp_path / "ours")
    theirs = logits(model)
    assert theirs.std() > 0.3
    torch.testing.assert_close(logits(decoder), theirs, rtol=1e-5, atol=1e-5)
    assert set(certificate.comparison.agreement.values()) == {1.0}
    assert len(certificate.comparison.agreement) == len(decoder.moe_layers)
    assert decoder.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    written = json.loads((tmp_path / "ours" / "certificate.json").read_text())
    assert written["failures"] == []
    assert written["source_keys"] == sum(len(move["sources"]) for move in written["moves"])


def test_layers_and_laws_are_those_of_the_config(tmp_path: Path) -> None:
    save_tiny(tmp_path / "theirs", tiny_checkpoint("glm4"))
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)
    decoder = load_decoder(tmp_path / "ours")
    assert decoder.layer_names == ["layers.01.moe", "layers.02.moe"]
    router = decoder.moe_layers["layers.01.moe"].router
    assert (router.score_fn, router.num_groups, router.groups_per_token) == ("sigmoid", 2, 1)
    assert router.route_scale == 1.5
    assert router.balancer.bias.abs().max() > 0


@pytest.mark.parametrize("name", ["mixtral", "qwen2, shared experts", "glm4", "ernie"])
def test_stacked_experts_are_the_same(name: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(name)
    for form in ("hub", "stacked"):
        save_tiny(tmp_path / form, model)
    edit_tensors(tmp_path / "stacked", lambda _: stacked_tensors(model))
    for form in ("hub", "stacked"):
        import_model(str(tmp_path / form), tmp_path / f"{form}-ours", tmp_path)
    assert set(load_file(tmp_path / "hub" / "model.safetensors")) != set(
        load_file(tmp_path / "stacked" / "model.safetensors")
    )
    hub, stacked = (
        load_file(tmp_path / f"{form}-ours" / "model.safetensors") for form in ("hub", "stacked")
    )
    assert hub.keys() == stacked.keys()
    assert all(torch.equal(hub[key], stacked[key]) for key in hub)


def test_shards_are_read(tmp_path: Path) -> None:
    model = tiny_checkpoint("qwen3, dense layers")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)
    decoder = load_decoder(tmp_path / "ours")
    torch.testing.assert_close(logits(decoder), logits(model), rtol=1e-5, atol=1e-5)
    assert decoder.tokenizer is None
    lost = sorted((tmp_path / "theirs").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"not there: {lost.name}"):
        import_model(str(tmp_path / "theirs"), tmp_path / "again", tmp_path)


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    tiny_checkpoint("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)
    decoder = load_decoder(tmp_path / "ours")
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    torch.testing.assert_close(logits(decoder), logits(model), rtol=1e-5, atol=1e-5)


def test_shared_experts_of_zeros_are_none(tmp_path: Path) -> None:
    model = tiny_checkpoint("qwen2, shared experts")
    for name, parameter in model.named_parameters():
        if "shared_expert" in name:
            torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)
    decoder = load_decoder(tmp_path / "ours")
    assert next(iter(decoder.moe_layers.values())).shared_experts is None
    torch.testing.assert_close(logits(decoder), logits(model), rtol=1e-5, atol=1e-5)


def test_a_tied_head_may_be_in_the_file_again(tmp_path: Path) -> None:
    save_tiny(tmp_path / "theirs", tiny_checkpoint("qwen3, tied"))
    embedding = "model.embed_tokens.weight"
    edit_tensors(tmp_path / "theirs", lambda t: t | {"lm_head.weight": t[embedding].clone()})
    certificate = import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)
    assert certificate.failures == []
    edit_tensors(tmp_path / "theirs", lambda t: t | {"lm_head.weight": t[embedding] + 1})
    with pytest.raises(ConversionFailed, match="must be equal, since they are tied"):
        import_model(str(tmp_path / "theirs"), tmp_path / "other", tmp_path)


BLOCK = "model.layers.1.mlp"
LOST = [f"{BLOCK}.experts.2.{part}_proj.weight" for part in ("gate", "up", "down")]


def without_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key not in LOST}


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (without_expert, "source tensors missing: .*experts.2.down_proj"),
        (lambda t: t | {"model.extra.weight": torch.ones(3)}, "not used: model.extra.weight"),
        (
            lambda t: t | {f"{BLOCK}.experts.{EXPERTS}.up_proj.weight": torch.ones(12, 16)},
            f"not used: {BLOCK}.experts.{EXPERTS}.up_proj.weight",
        ),
        (lambda t: t | {LOST[2]: torch.ones(16, 11)}, "down_proj.weight: "),
        (lambda t: t | {"model.norm.weight": torch.ones(17)}, r"makes \[17\], must be \[16\]"),
    ],
)  # fmt: skip
def test_a_file_that_lacks_or_adds_anything_fails(edit: Any, why: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "theirs", tiny_checkpoint("qwen3, tied"))
    edit_tensors(tmp_path / "theirs", edit)
    with pytest.raises(ConversionFailed, match=why):
        import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("mixtral", {"sliding_window": 8}, "a sliding window of 8 tokens"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("mixtral", {"num_experts_per_tok": 1}, "top_k=1 with normalize_weights=true"),
        ("qwen2, shared experts", {"qkv_bias": True}, "biases .qkv_bias"),
        ("qwen2, shared experts", {"shared_expert_intermediate_size": 20}, "be a multiple of"),
        ("qwen3, tied", {"attention_bias": True}, "biases .attention_bias"),
        ("qwen3, tied", {"hidden_act": "gelu"}, "activation gelu"),
        ("qwen3, tied", {"rope_parameters": SCALED}, "rope scaling .linear"),
        ("qwen3, tied", {"mlp_only_layers": [0, 1, 2]}, "a dense model.*routerlab upcycle"),
        ("glm4", {"partial_rotary_factor": 0.5}, "partial rotary positions .0.5"),
        ("ernie", {"use_bias": True}, "biases .use_bias"),
    ],
)  # fmt: skip
def test_what_ours_has_not_is_refused_by_name(
    name: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    tiny_checkpoint(name, **changes).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=why):
        import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)
    assert not (tmp_path / "ours").exists()


def test_a_learned_gate_on_shared_experts_is_refused(tmp_path: Path) -> None:
    model = tiny_checkpoint("qwen2, shared experts")
    torch.nn.init.normal_(model.model.layers[1].mlp.shared_expert_gate.weight)
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="learned gate on its shared experts"):
        import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("olmoe", "query-key norm over the full width"),
        ("deepseek_v3", "multi-head latent attention"),
        ("gpt_oss", "attention sinks"),
    ],
)
def test_other_families_are_refused_by_feature(family: str, why: str, tmp_path: Path) -> None:
    tiny_moe(family).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=why):
        import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)


def test_a_dense_model_is_for_upcycling(tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense")
    with pytest.raises(ValueError, match="dense model, without experts.*routerlab upcycle"):
        import_model(str(tmp_path / "dense"), tmp_path / "ours", tmp_path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    save_tiny(tmp_path / "theirs", tiny_checkpoint("mixtral"))
    before = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    with pytest.raises(ValueError, match="theirs': exists already and is not an empty directory"):
        import_model(str(tmp_path / "theirs"), tmp_path / "theirs", tmp_path)
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == before


def test_other_files_than_safetensors_are_refused(tmp_path: Path) -> None:
    model = tiny_checkpoint("mixtral")
    model.config.save_pretrained(tmp_path / "theirs")
    torch.save(model.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only weights in safetensors files are converted"):
        import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)
    (tmp_path / "theirs" / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="config.json but no weights"):
        import_model(str(tmp_path / "theirs"), tmp_path / "ours", tmp_path)
