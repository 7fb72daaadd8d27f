"""The pretrained backbone: padding, kept positions, gradients, precision, sizes and mistakes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM

from routerlab.adapters import MixtureOfLoraConfig
from routerlab.backbones.decoder import BackboneOutput
from routerlab.backbones.pretrained import PretrainedLM
from routerlab.core.routing import RoutingContext
from tests.helpers.language_models import (
    POSITIONS,
    VOCAB,
    save_tiny,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen3,
)

FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen3": tiny_qwen3}
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_fc"], "qwen3": ["v_proj"]}
ROUTER = {"_target_": "routerlab.routers.token_choice.TokenChoice", "top_k": 2, "init_std": 1.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models by family."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, make()) for name, make in FAMILIES.items()}


def loaded(folder: Path, adapter: Any = None, **options: Any) -> PretrainedLM:
    torch.manual_seed(1)
    return PretrainedLM(str(folder), folder.parent / "cache", adapter, **options)


def lora(targets: list[str], **options: Any) -> LoraConfig:
    """Plain LoRA that does something from the start."""
    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)


def mixture(**options: Any) -> MixtureOfLoraConfig:
    chosen = {"router": ROUTER, "num_experts": 4, "r": 2, "target_modules": ["up_proj"]} | options
    return MixtureOfLoraConfig(**chosen)


def ragged(left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Four sequences of 9, 6, 3 and 1 tokens as ids [4 9] and valid [4 9]."""
    places = torch.arange(9) if not left else torch.arange(8, -1, -1)
    valid = places < torch.tensor([9, 6, 3, 1])[:, None]
    return torch.randint(VOCAB, (4, 9)), valid


def stir(model: PretrainedLM) -> PretrainedLM:
    """Fresh mixtures add 0; these do not."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_model_of_transformers(folders: dict[str, Path], family: str) -> None:
    model, ids = loaded(folders[family]), torch.randint(VOCAB, (2, 7))
    out = model(ids)
    assert isinstance(out, BackboneOutput)
    assert out.router_outputs == model.moe_layers == {}
    theirs = AutoModelForCausalLM.from_pretrained(folders[family])
    assert torch.equal(out.logits, theirs(ids).logits)
    assert (model.vocab_size, model.max_positions) == (VOCAB, POSITIONS)
    assert model.tokenizer("a").input_ids == [3]


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(folders: dict[str, Path], family: str, left: bool) -> None:
    model = loaded(folders[family], lora(TARGETS[family]))
    ids, valid = ragged(left)
    context = RoutingContext(4, 9, valid=valid.flatten())
    got = model(ids, context).logits
    got.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for row, real, logits in zip(ids, valid, got, strict=True):
        alone = model(row[real][None]).logits[0]
        torch.testing.assert_close(logits[real], alone, rtol=1e-5, atol=1e-5)
    moved = model(torch.where(valid, ids, (ids + 1) % VOCAB), context).logits
    assert torch.equal(moved[valid], got[valid])


def test_positions_count_real_tokens(folders: dict[str, Path]) -> None:
    # the test above can fail: absolute positions that count padding give other logits
    model = loaded(folders["gpt2"])
    ids, valid = ragged()
    context = RoutingContext(4, 9, valid=valid.flatten())
    right = model(ids, context).logits
    model._takes -= {"position_ids"}
    assert (model(ids, context).logits - right)[valid].abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_positions_are_the_last(folders: dict[str, Path], family: str) -> None:
    model, ids = loaded(folders[family], lora(TARGETS[family])), torch.randint(VOCAB, (2, 7))
    full = model(ids).logits
    for keep in (1, 3, 7):
        kept = model(ids, logits_to_keep=keep).logits
        torch.testing.assert_close(kept, full[:, -keep:], rtol=1e-5, atol=1e-6)
    model._takes -= {"logits_to_keep"}
    assert torch.equal(model(ids, logits_to_keep=3).logits, full[:, -3:])


def test_the_head_sees_kept_positions_only(folders: dict[str, Path]) -> None:
    model, seen = loaded(folders["llama"]), []
    model.model.lm_head.register_forward_hook(lambda head, args, out: seen.append(args[0].shape))
    model(torch.randint(VOCAB, (2, 7)), logits_to_keep=3)
    assert seen == [(2, 3, 32)]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_trains(folders: dict[str, Path], family: str) -> None:
    model, ids = loaded(folders[family], lora(TARGETS[family])), torch.randint(VOCAB, (2, 7))
    model.train()
    model(ids).logits.square().mean().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in model.named_parameters() if "lora_" in n}
    before = model(ids).logits
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert not torch.equal(model(ids).logits, before)


def test_the_dropout_of_the_base_is_off(tmp_path: Path) -> None:
    dropping = tiny_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model, ids = loaded(save_tiny(tmp_path, dropping)), torch.randint(VOCAB, (2, 7))
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_loading_leaves_the_generator_alone(folders: dict[str, Path]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    PretrainedLM(str(folders["llama"]), "unused")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_gives_equal_gradients(folders: dict[str, Path], family: str) -> None:
    ids, valid = ragged()
    gradients = []
    for activation_checkpointing in (False, True):
        adapter = lora(TARGETS[family], lora_dropout=0.3)
        model = loaded(
            folders[family], adapter, activation_checkpointing=activation_checkpointing
        ).train()
        torch.manual_seed(2)
        model(ids, RoutingContext(4, 9, valid=valid.flatten())).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_checkpointing_recomputes_and_spares_the_layers_below(folders: dict[str, Path]) -> None:
    adapter = lora(["q_proj"], layers_to_transform=[1])
    model = loaded(folders["llama"], adapter, activation_checkpointing=True).train()
    calls: list[tuple[int, bool]] = []
    for i, layer in enumerate(model.model.get_base_model().model.layers):
        layer.input_layernorm.register_forward_pre_hook(
            lambda norm, args, i=i: calls.append((i, args[0].requires_grad))
        )
    model(torch.randint(VOCAB, (2, 7))).logits.square().mean().backward()
    # nothing below the first adapted layer runs again, or has a gradient
    assert calls == [(0, False), (1, False), (1, False)]


def test_bfloat16_keeps_adapters_in_float32(folders: dict[str, Path]) -> None:
    model, ids = loaded(folders["llama"], lora(["q_proj"]), dtype="bfloat16"), ragged()[0]
    kinds = {("lora_" in n, p.dtype) for n, p in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    full = loaded(folders["llama"], lora(["q_proj"]))
    full.load_state_dict(model.state_dict())
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - full(ids).logits).std() < 0.05 < 0.5 < full(ids).logits.std()
    logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_records_of_a_mixture(folders: dict[str, Path]) -> None:
    model = loaded(folders["llama"], mixture(), activation_checkpointing=True).train()
    names = ["layers.00.mlp.up_proj", "layers.01.mlp.up_proj"]
    assert model.layer_names == list(model.moe_layers) == names
    assert [layer.experts.num_experts for layer in model.moe_layers.values()] == [4, 4]
    ids, valid = ragged()
    out = model(ids, RoutingContext(4, 9, valid=valid.flatten()))
    assert list(out.router_outputs) == names
    for record in out.router_outputs.values():
        assert int(record.tokens_per_expert.sum()) == 2 * 19
    other = model(ids).router_outputs  # another pass leaves the first one's records alone
    out.logits.square().mean().backward()
    assert all(out.router_outputs[name] is not other[name] for name in names)
    assert int(out.router_outputs[names[0]].tokens_per_expert.sum()) == 2 * 19


def test_padding_changes_nothing_for_a_mixture(folders: dict[str, Path]) -> None:
    model = stir(loaded(folders["llama"], mixture()))
    ids, valid = ragged()
    got = model(ids, RoutingContext(4, 9, valid=valid.flatten())).logits
    assert (got - loaded(folders["llama"])(ids).logits).abs().max() > 0.1
    for row, real, logits in zip(ids, valid, got, strict=True):
        alone = model(row[real][None]).logits[0]
        torch.testing.assert_close(logits[real], alone, rtol=1e-5, atol=1e-5)


def test_parameter_counts(folders: dict[str, Path]) -> None:
    base = sum(p.numel() for p in tiny_llama().parameters())
    assert loaded(folders["llama"]).count_parameters() == {
        "total": base, "active": base, "trainable": 0,
    }  # fmt: skip
    one_lora = 2 * (32 + 48)
    plain = loaded(folders["llama"], lora(["up_proj"])).count_parameters()
    assert plain["trainable"] == plain["total"] - base == plain["active"] - base == 2 * one_lora
    counted = loaded(folders["llama"], mixture()).count_parameters()
    assert counted["trainable"] == counted["total"] - base == 2 * (4 * one_lora + 4 * 32)
    assert counted["active"] - base == 2 * (2 * one_lora + 4 * 32)  # 2 of 4 experts, the gate
    shared = loaded(folders["llama"], mixture(experts="shared_a")).count_parameters()
    assert shared["total"] - shared["active"] == 2 * 2 * 48 * 2


def test_an_adapter_saves_without_the_base(folders: dict[str, Path], tmp_path: Path) -> None:
    model, ids = stir(loaded(folders["llama"], mixture())), torch.randint(VOCAB, (2, 7))
    model.save_adapter(tmp_path / "adapter")
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 40_000
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    assert again.peft_config["default"].base_model_name_or_path == str(folders["llama"])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="adapter=None"):
        loaded(folders["llama"]).save_adapter(tmp_path)


def test_the_config_that_was_given_is_left_alone(folders: dict[str, Path]) -> None:
    adapter = lora(["q_proj"])
    before = adapter.to_dict()
    loaded(folders["llama"], adapter)
    assert adapter.to_dict() == before


def test_mistakes(folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    with pytest.raises(ValueError, match=r"dtype='float8': must be one of 'float32', 'bfloat16'"):
        loaded(folder, dtype="float8")
    with pytest.raises(ValueError, match="adapter=PromptTuningConfig: adds tokens"):
        loaded(folder, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model = loaded(folder)
    with pytest.raises(ValueError, match=r"129 tokens: longer than max_positions=128"):
        model(torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(ValueError, match="logits_to_keep=8: must be at least 0 and at most 7"):
        model(torch.zeros(1, 7, dtype=torch.long), logits_to_keep=8)
