"""Trained plain LoRAs as experts: each keeps what it computed, to the last digit of float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from routerlab.adapters import MixtureOfLoraConfig
from routerlab.core.routing import RoutingContext
from tests.adapters.forms import adapted, config_of, logits_of, some_ids, stir
from tests.helpers.language_models import tiny_gpt2, tiny_llama

TARGETS = ["gate_proj", "up_proj", "down_proj"]
SOURCES: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 3, "use_rslora": True},
    {"r": 3, "lora_alpha": 16},
]


def train_loras(folder: Path, make: Any = tiny_llama, **changes: Any) -> list[str]:
    """Saves three LoRAs with weights that differ; returns their directories."""
    for number, options in enumerate(SOURCES):
        usual = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        config = LoraConfig(**usual | options | changes)
        model = get_peft_model(make(), config)
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder / f"lora_{number}", save_embedding_layers=False)
    return [str(folder / f"lora_{number}") for number in range(len(SOURCES))]


def mixture(sources: list[str], base: Any = None, **changes: Any) -> Any:
    """A mixture of them, as fresh as it comes."""
    usual = {"router": "by_task", "num_experts": 3, "r": 4, "target_modules": TARGETS}
    config = config_of("lora", **usual | changes, experts_from=sources)
    return get_peft_model(tiny_llama() if base is None else base, config).eval()


def alone(source: str, ids: Tensor, base: Any = None) -> Tensor:
    """What a LoRA computes by itself."""
    model = PeftModel.from_pretrained(tiny_llama() if base is None else base, source)
    with torch.no_grad():
        return model(ids).logits


def for_task(model: Any, task: int, ids: Tensor) -> Tensor:
    """Logits with every sequence of one task."""
    with model.base_model.state.tasks(torch.full((len(ids),), task)), torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("lora_alpha", [4.0, 1.0])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_each_expert_is_the_lora_that_it_came_from(
    make: Any, lora_alpha: float, tmp_path: Path
) -> None:
    targets = TARGETS if make is tiny_llama else ["c_fc", "mlp.c_proj"]
    sources = train_loras(tmp_path, make, target_modules=targets)
    model = mixture(sources, make(), target_modules=targets, lora_alpha=lora_alpha, r=5)
    ids = some_ids()
    for task, source in enumerate(sources):
        want = alone(source, ids, make())
        assert not torch.allclose(want, make()(ids).logits, rtol=0.01)
        torch.testing.assert_close(for_task(model, task, ids), want, rtol=1e-5, atol=1e-5)
    with model.base_model.state.tasks(torch.tensor([2, 0, 1])), torch.no_grad():
        mixed = model(ids).logits
    for row, task in enumerate([2, 0, 1]):
        want = alone(sources[task], ids[row : row + 1], make())
        torch.testing.assert_close(mixed[row : row + 1], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("omega", ["lora", "rslora"])
def test_constant_weights_are_folded_in(omega: str, tmp_path: Path) -> None:
    sources = train_loras(tmp_path)
    model = mixture(sources, router="subset_sampling", top_k=2, omega=omega)
    for layer in model.base_model.state.layers.values():
        assert layer.router.weight == pytest.approx(2 / (8 if omega == "lora" else 8**0.5))
    for expert, source in enumerate(sources):
        lora = PeftModel.from_pretrained(tiny_llama(), source)
        for name, layer in model.base_model.state.layers.items():
            x = torch.randn(5, layer.in_features)
            weights = torch.zeros(5, 3)
            weights[:, expert] = layer.router.weight
            linear = lora.base_model.model.model.get_submodule(name.replace("s.0", "s."))
            want = linear(x) - linear.base_layer(x)
            assert want.abs().max() > 0.1
            codes, up = layer.experts.factors(x, weights, RoutingContext(1, 5))
            got = layer.experts.scaling * codes @ up.T
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_experts_absent_from_a_module_are_left_out(tmp_path: Path) -> None:
    sources = train_loras(tmp_path)
    few = tmp_path / "few"
    config = LoraConfig(r=2, target_modules=["up_proj"], layers_to_transform=[1])
    stir(get_peft_model(tiny_llama(), config)).save_pretrained(few)
    sources[1] = str(few)
    with pytest.raises(ValueError, match="experts .1. have no weights here, and ByTask cannot"):
        mixture(sources)
    model = mixture(sources, router="lora_mixer")
    absent = model.peft_config["default"].absent_experts
    assert set(absent) == {*model.base_model.state.layers} - {"layers.01.mlp.up_proj"}
    assert all(experts == [1] for experts in absent.values())
    for train in (True, False):
        model.train(train)
        model(some_ids())
        for name, record in model.base_model.state.records.items():
            assert bool(record.tokens_per_expert[1] > 0) == (name not in absent)
            assert bool((record.router_probs[:, 1] == 0).all()) == (name in absent)
    model.save_pretrained(tmp_path / "mixed")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mixed")
    assert again.peft_config["default"].absent_experts == absent
    assert torch.equal(logits_of(again, some_ids()), logits_of(model, some_ids()))
    with pytest.raises(ValueError, match="router_scope='block': experts .1. have no w"):
        mixture(sources, router="lora_mixer", router_scope="block")


def test_a_saved_mixture_needs_its_sources_no_more(tmp_path: Path) -> None:
    sources = train_loras(tmp_path / "sources")
    model = mixture(sources)
    model.save_pretrained(tmp_path / "mixed")
    for file in (tmp_path / "sources").rglob("*.*"):
        file.unlink()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mixed")
    assert torch.equal(for_task(again, 1, some_ids()), for_task(model, 1, some_ids()))


def test_one_config_starts_several_models(tmp_path: Path) -> None:
    config = MixtureOfLoraConfig(
        router="by_task", num_experts=3, r=4, target_modules=TARGETS,
        experts_from=train_loras(tmp_path),
    )  # fmt: skip
    models = [get_peft_model(tiny_llama(), config).eval() for _ in range(2)]
    first, second = (for_task(model, 1, some_ids()) for model in models)
    assert torch.equal(first, second)


def test_frozen_experts_leave_the_routers_to_learn(tmp_path: Path) -> None:
    model = mixture(train_loras(tmp_path), router="lora_mixer", train_experts=False).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(some_ids(), labels=some_ids()).loss.backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "mix_router" in n}
    model.add_adapter("other", config_of("lora"))
    model.set_adapter("other")
    model.set_adapter("default")
    with model.disable_adapter():
        model(some_ids())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == changed


def test_a_plain_lora_stands_beside_them(tmp_path: Path) -> None:
    model = mixture(train_loras(tmp_path), plain_modules=["q_proj"])
    ids = some_ids()
    want = alone(str(tmp_path / "lora_2"), ids)
    torch.testing.assert_close(for_task(model, 2, ids), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "changes", "message"),
    [
        ({}, {"num_experts": 4}, "3 adapters for num_experts=4 experts"),
        ({}, {"num_experts": 2}, "3 adapters for num_experts=2 experts"),
        ({}, {"r": 3}, "has rank 4, above r=3"),
        ({}, {"target_modules": ["up_proj", "gate_proj"]}, "down_proj, which target_modules leave"),
        ({}, {"target_modules": [*TARGETS, "q_proj"]}, "no adapter adapts layers.00.self_attn.q"),
        ({"use_dora": True}, {}, "uses use_dora, which experts cannot have"),
        ({"rank_pattern": {"up_proj": 1}}, {}, "uses rank_pattern"),
        ({"alpha_pattern": {"up_proj": 1}}, {}, "uses alpha_pattern"),
        ({"bias": "lora_only"}, {}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, {}, "uses modules_to_save"),
        ({"make": lambda: tiny_llama(intermediate_size=64)}, {}, "model's is 48 x 32: another"),
        ({"make": lambda: tiny_llama(num_hidden_layers=3)}, {}, "adapts .*layers.2.mlp.down_proj"),
    ],
)  # fmt: skip
def test_sources_that_cannot_become_experts(
    lora: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sources = train_loras(tmp_path, **lora)
    with pytest.raises(ValueError, match=message):
        mixture(sources, **changes)


def test_sources_that_are_not_loras(tmp_path: Path) -> None:
    sources = train_loras(tmp_path)
    adapted().save_pretrained(tmp_path / "mixed")
    with pytest.raises(ValueError, match="is a ROUTERLAB_MIXTURE, not a plain LORA adapter"):
        mixture([*sources[:2], str(tmp_path / "mixed")])
    (Path(sources[0]) / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no adapter_model.safetensors"):
        mixture(sources)
