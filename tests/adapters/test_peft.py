"""The adapter is a PEFT adapter like any other: its life from creation to disk and back."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from torch import nn

from routerlab.adapters import MixtureOfLoraConfig
from tests.adapters.forms import FORMS, adapted, config_of, logits_of, run, some_ids, stir
from tests.helpers.language_models import tiny_llama

# Linears of the feed-forward network: twice 32 to 48, once 48 to 32; two layers. E = 4, r = 2.
_LORA = 2 * 3 * (32 + 48) * 2
TRAINABLE = {
    "lora": 4 * _LORA + 2 * (32 + 32 + 48) * 4,
    "shared_a": 2 * 2 * (32 + 32 + 48) + 4 * 2 * 2 * (48 + 48 + 32) + 2 * (32 + 32 + 48) * 4,
    "core": _LORA + 6 * 4 * 2 * 2 + 6 * 2 * 4,
    "feed_forward": 4 * _LORA + 2 * 32 * 4 + 2 * 2 * (32 + 32) + 2 * 2 * (32 + 16),
    "skills": 4 * _LORA + 6 * 3 * 2 * 4,
    "plain": _LORA,
}

# Every option at another value than its default, where the form allows it.
UNUSUAL = [
    {
        "router": "subset_sampling", "num_experts": 3, "top_k": 2, "granularity": "sequence",
        "router_init": "kaiming_uniform", "r": 3, "lora_alpha": 5.0, "omega": "rslora",
        "lora_dropout": 0.1, "train_experts": False, "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.0.self_attn.v_proj"], "plain_modules": ["down_proj"],
        "use_rslora": True,
    },
    {"router": "mixtral", "router_scope": "block", "layers_to_transform": [1],
     "layers_pattern": "layers", "modules_to_save": ["embed_tokens"]},
    {"router": "soft", "experts": "shared_a", "dropout_per_expert": True, "lora_dropout": 0.2},
    {"router": "soft", "experts": "core", "core_dropout": True, "core_router": False,
     "lora_dropout": 0.2, "target_modules": r".*\.(up|down)_proj"},
    {"router": None, "experts": "skills", "num_tasks": 3, "num_heads": 4, "gate_noise": False},
    {"router": {"_target_": "routerlab.routers.token_choice.TokenChoice", "top_k": 3,
                "jitter_eps": 0.1,
                "balancer": {"_target_": "routerlab.balancers.expert_bias.ExpertBias",
                             "rate": 0.25}}, "experts": "feed_forward"},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_trains_the_adapter_and_nothing_else(form: str) -> None:
    base = tiny_llama()
    before, ids = base(some_ids()).logits, some_ids()
    model = get_peft_model(base, config_of(form)).eval()
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == TRAINABLE[form]
    assert total == trainable + sum(p.numel() for p in tiny_llama().parameters())
    torch.testing.assert_close(logits_of(model, ids), before, rtol=0, atol=1e-5)
    run(stir(model), ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".default." in name), name


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_loaded_bitwise(form: str, tmp_path: Path) -> None:
    model = adapted(form)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits_of(again, some_ids()), logits_of(model, some_ids()))
    assert not any(p.requires_grad for p in again.parameters())
    assert not again.training
    trains = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert trains.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    meta = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits_of(meta, some_ids()), logits_of(model, some_ids()))


@pytest.mark.parametrize("number", range(len(UNUSUAL)))
def test_every_option_survives(number: int, tmp_path: Path) -> None:
    config = MixtureOfLoraConfig(**UNUSUAL[number], task_type="CAUSAL_LM")
    model = stir(get_peft_model(tiny_llama(), config)).eval()
    model.save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(saved, MixtureOfLoraConfig)
    skip = ("inference_mode", "base_model_name_or_path")
    mine, read = config.to_dict(), saved.to_dict()
    assert {k: v for k, v in read.items() if k not in skip} == {
        k: v for k, v in mine.items() if k not in skip
    }
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for name in model.base_model.state.layers:
        first, second = model.base_model.state.layers[name], again.base_model.state.layers[name]
        assert str(first.router) == str(second.router)
    assert torch.equal(logits_of(again, some_ids()), logits_of(model, some_ids()))


def test_every_option_is_tried_somewhere() -> None:
    tried = {name for options in UNUSUAL for name in options}
    fields = set(MixtureOfLoraConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    elsewhere = {"experts_from", "absent_experts", "adapt", "adapt_from", "base_model"}
    assert fields - tried == elsewhere | {"format_version"}


def test_another_process_gets_the_same_logits(tmp_path: Path) -> None:
    model = adapted("lora", router="deepseek_v3", num_experts=8)
    tiny_llama().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    program = (
        "import sys, torch; import routerlab.adapters; from peft import AutoPeftModelForCausalLM\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])\n"
    )
    ids, answer = tmp_path / "ids.pt", tmp_path / "logits.pt"
    torch.save(some_ids(), ids)
    words = [str(tmp_path / "adapter"), str(ids), str(answer)]
    subprocess.run([sys.executable, "-c", program, *words], check=True, timeout=120)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(answer), model(some_ids()).logits, rtol=0, atol=1e-6)
    here = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(here(some_ids()).logits, model(some_ids()).logits)


def test_buffers_of_a_balancer_are_saved(tmp_path: Path) -> None:
    model = adapted(router="deepseek_v3", num_experts=8)
    for layer in model.base_model.state.layers.values():
        layer.router.balancer.bias += torch.tensor([3.0, -3.0] * 4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for layer in again.base_model.state.layers.values():
        assert layer.router.balancer.bias.tolist() == [3.0, -3.0] * 4
    assert torch.equal(logits_of(again, some_ids()), logits_of(model, some_ids()))


def test_frozen_experts_are_saved_and_stay_frozen(tmp_path: Path) -> None:
    model = adapted(train_experts=False)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert torch.equal(logits_of(again, some_ids()), logits_of(model, some_ids()))
    model.add_adapter("other", config_of("lora"))
    model.set_adapter("other")
    model.set_adapter("default")
    for each in (model, again):
        learns = [n for n, p in each.named_parameters() if p.requires_grad]
        assert learns
        assert all(".mix_router.default." in name for name in learns)


@pytest.mark.parametrize("form", FORMS)
def test_several_adapters_one_at_a_time(form: str) -> None:
    model = adapted(form)
    ids = some_ids()
    first = logits_of(model, ids)
    model.add_adapter("second", config_of(form, r=3))
    stir(model, "second", 0.4)
    assert torch.equal(logits_of(model, ids), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".second." in n)
    model.set_adapter("second")
    second = logits_of(model, ids)
    assert not torch.allclose(second, first)
    assert all(p.requires_grad == (".second." in n) for n, p in model.named_parameters())
    alone = adapted(form, r=3)
    alone.load_state_dict(
        {
            name.replace(".second.", ".default."): value
            for name, value in model.state_dict().items()
            if ".default." not in name
        }
    )
    assert torch.equal(second, logits_of(alone, ids))
    model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits_of(model, ids), first)
    assert not any(".second." in name for name in model.state_dict())
    with pytest.raises(ValueError, match="one mixture can be active at a time"):
        next(iter(model.base_model.state.layers.values())).set_adapter(["default", "other"])


@pytest.mark.parametrize("form", FORMS)
def test_a_second_adapter_is_loaded_beside_the_first(form: str, tmp_path: Path) -> None:
    saved = stir(adapted(form), size=0.5)
    saved.save_pretrained(tmp_path)
    model = adapted(form)
    model.load_adapter(str(tmp_path), "loaded")
    model.set_adapter("loaded")
    assert torch.equal(logits_of(model, some_ids()), logits_of(saved, some_ids()))


@pytest.mark.parametrize("form", FORMS)
def test_switched_off_it_is_the_base_model(form: str) -> None:
    model, ids = adapted(form), some_ids()
    want, on = tiny_llama()(ids).logits, logits_of(model, ids)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(ids).logits, want)
        assert model.base_model.state.records == {}
    assert torch.equal(logits_of(model, ids), on)
    assert not torch.allclose(on, want)


def test_merging_is_refused_and_does_no_harm() -> None:
    model, ids = adapted(), some_ids()
    want = logits_of(model, ids)
    layer = model.base_model.state.layers["layers.00.mlp.up_proj"]
    merges = (
        model.merge_and_unload, model.merge_adapter, model.unmerge_adapter, layer.merge,
        layer.unmerge,
    )  # fmt: skip
    for merge in merges:
        with pytest.raises(ValueError, match="which experts a token gets depends on the token"):
            merge()
    assert torch.equal(logits_of(model, ids), want)


@pytest.mark.parametrize("form", FORMS)
def test_unloading_gives_the_base_model_back(form: str) -> None:
    model = adapted(form)
    model.gradient_checkpointing_enable()
    run(model.train(), some_ids())
    base = model.unload().eval()
    assert [type(m) for m in base.modules()] == [type(m) for m in tiny_llama().modules()]
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert not any("InContext" in repr(v) for m in base.modules() for v in vars(m).values())
    assert torch.equal(base(some_ids()).logits, tiny_llama()(some_ids()).logits)
    again = get_peft_model(base, config_of(form))
    assert again.get_nb_trainable_parameters()[0] == TRAINABLE[form]


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_has_a_life_of_its_own(form: str) -> None:
    model = adapted(form).train()
    run(model, some_ids())  # leaves records with a graph
    twin = copy.deepcopy(model)
    state, other = model.base_model.state, twin.base_model.state
    before = dict(state.records)
    run(twin.eval(), some_ids(2))
    assert other is not state
    assert state.records == before
    assert set(other.records) == set(before)
    assert all(len(r.router_logits) == 14 for r in other.records.values())
    for layer in other.layers.values():
        assert layer.state is other
        assert any(layer is module for module in twin.modules())
    twin.unload()
    assert torch.equal(logits_of(model.eval(), some_ids()), logits_of(adapted(form), some_ids()))


@pytest.mark.parametrize("form", FORMS)
def test_adapters_of_a_bf16_base_stay_in_float32(form: str) -> None:
    model = adapted(form, tiny_llama().bfloat16())
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if ".default." in name else torch.bfloat16
        assert parameter.dtype == wanted, name
    out = run(model, some_ids(), labels=some_ids())
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    for record in model.base_model.state.records.values():
        assert record.router_logits.dtype == torch.float32


def test_a_config_serves_several_models(tmp_path: Path) -> None:
    config = config_of("lora")
    models = [stir(get_peft_model(tiny_llama(seed), config)).eval() for seed in (0, 1)]
    for model in models:
        assert model(some_ids()).logits.isfinite().all()
    models[1].save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(1), tmp_path)
    assert torch.equal(logits_of(again, some_ids()), logits_of(models[1], some_ids()))


def test_a_model_that_is_not_of_transformers() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Embedding(64, 8), nn.Linear(8, 5)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.up(self.embed(input_ids))

    config = MixtureOfLoraConfig(router="mixtral", num_experts=4, target_modules=["up"])
    model = stir(get_peft_model(Plain(), config))
    assert model(some_ids()).shape == (3, 7, 5)
    assert list(model.base_model.state.records) == ["up"]


def test_what_is_saved_is_small_and_plain(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "ROUTERLAB_MIXTURE"
    assert saved["format_version"] == 1
    assert saved["router"]["_target_"] == "routerlab.routers.token_choice.TokenChoice"
    assert saved["base_model"]["hidden_size"] == 32
