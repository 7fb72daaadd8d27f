"""Which modules are adapted, on which base model, and what is refused without leaving a trace."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from tests.adapters.forms import adapted, config_of, logits_of, some_ids
from tests.helpers.language_models import tiny_gpt2, tiny_llama, tiny_qwen3

GATED = [f"layers.0{i}.mlp.{n}_proj" for i in range(2) for n in ("gate", "up", "down")]
CONV = [f"h.0{i}.mlp.{n}" for i in range(2) for n in ("c_fc", "c_proj")]


def tiny_opt() -> OPTForCausalLM:
    """Its layers hold the feed-forward network beside the attention."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(**sizes | more)).eval()


def names(model: Any) -> list[str]:
    """The adapted modules."""
    return list(model.base_model.state.layers)


@pytest.mark.parametrize(
    ("make", "form", "want"),
    [
        (tiny_llama, "lora", GATED),
        (tiny_qwen3, "lora", GATED),
        (tiny_gpt2, "lora", CONV),
        (tiny_opt, "lora", [f"layers.0{i}.fc{n}" for i in range(2) for n in (1, 2)]),
        (tiny_llama, "feed_forward", ["layers.00.mlp", "layers.01.mlp"]),
        (tiny_gpt2, "feed_forward", ["h.00.mlp", "h.01.mlp"]),
    ],
)
def test_feed_forward_networks_are_the_default(make: Any, form: str, want: list[str]) -> None:
    model = adapted(form, make(), plain_modules=None)
    assert names(model) == want
    assert logits_of(model, some_ids()).isfinite().all()
    fresh = get_peft_model(make(), config_of(form, plain_modules=None)).eval()
    torch.testing.assert_close(
        logits_of(fresh, some_ids()), make()(some_ids()).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("form", ["lora", "feed_forward"])
def test_layers_of_gpt2_compute_what_their_linears_would(form: str, tmp_path: Path) -> None:
    model = adapted(form, tiny_gpt2(), plain_modules=["c_attn"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    assert torch.equal(logits_of(again, some_ids()), logits_of(model, some_ids()))
    base = tiny_gpt2()
    for module in list(base.modules()):  # the same weights in modules of torch
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Conv1D":
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data, linear.bias.data = child.weight.data.T, child.bias.data
                setattr(module, name, linear)
    twin = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(
        logits_of(twin, some_ids()), logits_of(model, some_ids()), rtol=1e-4, atol=1e-4
    )


def test_targets_can_be_named_in_all_ways_of_peft() -> None:
    attention = adapted(target_modules=["q_proj", "self_attn.v_proj"])
    assert names(attention) == [f"layers.0{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"]
    one = adapted(target_modules=["q_proj"], layers_to_transform=[1])
    assert names(one) == ["layers.01.self_attn.q_proj"]
    some = adapted(target_modules=["q_proj", "k_proj"], exclude_modules=r".*layers\.0\.self.*k_.*")
    left = ("layers.00.self_attn.q", "layers.01.self_attn.q", "layers.01.self_attn.k")
    assert names(some) == [f"{name}_proj" for name in left]
    pattern = adapted(target_modules=r".*layers\.1\..*(up|down)_proj")
    assert names(pattern) == ["layers.01.mlp.up_proj", "layers.01.mlp.down_proj"]
    head = adapted(target_modules=["lm_head"])
    assert names(head) == ["lm_head"]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("lora", {"target_modules": ["q_prj"]}, "'q_prj' matches no module.*did you mean 'q_proj'"),
    ("lora", {"target_modules": ["up_proj", "gate_prj"]}, "'gate_prj' matches no.*'gate_proj'"),
    ("lora", {"target_modules": r".*\.qq_proj"}, "matches no module of the base model"),
    ("lora", {"target_modules": ["q_proj"], "layers_to_transform": [7]}, "layers_to_transform=.7"),
    ("lora", {"plain_modules": ["o_prj"]}, "plain_modules: 'o_prj' matches no.*'o_proj'"),
    ("lora", {"target_modules": ["mlp"]}, "mlp' is a LlamaMLP, not a linear"),
    ("lora", {"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is a Embedding, not a"),
    ("feed_forward", {"target_modules": ["self_attn"], "plain_modules": None},
     "is not a feed-forward network that"),
    ("feed_forward", {"plain_modules": ["up_proj"]}, "mlp' and 'model.layers.0.mlp.up_.* overlap"),
    ("lora", {"plain_modules": ["up_proj"]}, "mlp.up_proj' overlap"),
    ("lora", {"router": "deepseek_v3", "num_experts": 6}, "num_groups"),
    ("lora", {"router": "mixtral", "num_experts": 1}, "top_k=2: must be at least 1 and at most 1"),
    ("skills", {"num_heads": 3}, "num_heads=3: must divide the 32 input"),
    ("skills", {"num_heads": 16, "target_modules": ["up_proj", "q_proj", "odd"]}, "num_heads=16"),
    ("lora", {"experts_from": ["here", "there"]}, "2 adapters for num_experts=4"),
    ("lora", {"experts_from": ["a", "b", "c", "d"]}, "'a' holds no adapter_config.json"),
    ("core", {"experts_from": ["a", "b", "c", "d"]}, "become experts of 'lora', not of 'core'"),
]  # fmt: skip


def _with_odd_layer() -> Any:
    base = tiny_llama()
    base.odd = nn.Linear(32, 40)  # comes last: refused when the others are adapted
    return base


@pytest.mark.parametrize(("form", "changes", "message"), REFUSED)
def test_a_refusal_leaves_the_model_as_it_was(
    form: str, changes: dict[str, Any], message: str
) -> None:
    base = _with_odd_layer()
    base.odd.requires_grad_(False)
    modules = dict(base.named_modules())
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config_of(form, **changes))
    assert dict(base.named_modules()) == modules
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert {n for n, p in base.named_parameters() if not p.requires_grad} == {
        "odd.weight", "odd.bias"
    }  # fmt: skip
    assert torch.equal(base(some_ids()).logits, tiny_llama()(some_ids()).logits)
    get_peft_model(base, config_of("lora"))


@pytest.mark.parametrize(
    ("form", "second", "message"),
    [
        ("lora", {"target_modules": ["q_prj"]}, "'q_prj' matches no module"),
        ("lora", {"router": "deepseek_v3", "num_experts": 6}, "num_groups"),
        ("feed_forward", {}, "'model.layers.0.mlp.down_proj' overlap"),
        ("skills", {}, "already has an adapter of another kind"),
        ("lora", {"target_modules": ["q_proj"], "experts_from": ["x"] * 4}, "no adapter_config"),
    ],
)
def test_a_refused_second_adapter_leaves_the_first(
    form: str, second: dict[str, Any], message: str
) -> None:
    model = adapted()
    want, modules = logits_of(model, some_ids()), dict(model.named_modules())
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", config_of(form, **second))
    assert dict(model.named_modules()) == modules
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    assert torch.equal(logits_of(model, some_ids()), want)
    assert list(model.base_model.state.records) == GATED
    model.add_adapter("second", config_of("lora", target_modules=["q_proj"]))
    assert torch.equal(logits_of(model, some_ids()), want)
    model.set_adapter("second")
    assert names(model)[6:] == ["layers.00.self_attn.q_proj", "layers.01.self_attn.q_proj"]
    model(some_ids())
    assert list(model.base_model.state.records) == names(model)[6:]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: tiny_llama(num_hidden_layers=3), "num_hidden_layers=2, this one has num_hidden_"),
        (lambda: tiny_llama(hidden_size=64), "hidden_size=32, this one has hidden_size=64"),
        (lambda: tiny_llama(vocab_size=65), "vocab_size=64, this one has vocab_size=65"),
        (tiny_qwen3, "class=LlamaForCausalLM, this one has class=Qwen3ForCausalLM"),
        (lambda: tiny_llama(1), "of these sizes with another embedding"),
        (lambda: tiny_llama(2), "of these sizes with another embedding"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_base_model_is_refused(
    base: Any, message: str, tmp_path: Path
) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base(), tmp_path)
    PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path)  # rounded, it is the same one


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text()) | {"format_version": 2}
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="format_version=2: saved by a newer routerlab"):
        PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "target",
    ["torch.load", "os.system", "subprocess.run", "torch.nn.Linear", "routerlab.core.checks.within",
     "routerlab.core.routing.RouterOutput", 7],
)  # fmt: skip
@pytest.mark.parametrize("place", ["router", "balancer", "knob"])
def test_a_saved_config_cannot_name_any_callable(target: Any, place: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    harmful = {"_target_": target, "f": str(tmp_path / "x.pt")}
    if place == "router":
        saved["router"] = harmful
    else:
        saved["router"]["balancer" if place == "balancer" else "init_std"] = harmful
    file.write_text(json.dumps(saved))
    wanted = {"router": "is not a router|must come from", "balancer": "is not a bal|must come from"}
    with pytest.raises(ValueError, match=wanted.get(place, "must be a plain value")):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("name", ["gate", "lora_A", "mix_router", "weight"])
def test_names_that_would_mix_up_saved_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"adapter name '{name}': is that of a part"):
        adapted().add_adapter(name, config_of("lora"))
    with pytest.raises(ValueError, match=f"adapter name '{name}': is that of a part"):
        get_peft_model(tiny_llama(), config_of("lora"), adapter_name=name)


def test_one_of_several_adapters_is_saved(tmp_path: Path) -> None:
    model = adapted()
    want = logits_of(model, some_ids())
    model.add_adapter("up", config_of("lora", r=3))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name="any")
    assert torch.equal(logits_of(again, some_ids()), want)
    assert not any("up" in key.split(".")[-3:] for key in again.state_dict())


def test_names_of_records_sort_by_depth() -> None:
    model = adapted(base=tiny_llama(num_hidden_layers=11))
    assert sorted(names(model), key=lambda n: n[:9]) == names(model)
    assert all(re.fullmatch(r"layers\.\d\d\.mlp\.\w+", name) for name in names(model))
