"""The state of the pretrained backbone is its adapter, and nothing else fits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from routerlab.adapters import MixtureOfLoraConfig
from routerlab.backbones.pretrained import PretrainedLM
from tests.helpers.language_models import VOCAB, save_tiny

ROUTER = {"_target_": "routerlab.routers.token_choice.TokenChoice", "top_k": 2}
ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    "modules_to_save": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    "mixture": MixtureOfLoraConfig(
        router=ROUTER, num_experts=4, r=2, target_modules=["up_proj", "q_proj"]
    ),
    "frozen_experts": MixtureOfLoraConfig(
        router=ROUTER, num_experts=4, r=2, target_modules=["up_proj"], train_experts=False
    ),
    "feed_forward": MixtureOfLoraConfig(
        router=ROUTER, num_experts=4, r=2, experts="feed_forward", target_modules=["mlp"]
    ),
}


class Outer(nn.Module):
    """As a LightningModule holds it."""

    def __init__(self, backbone: PretrainedLM) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def loaded(folder: Path, adapter: Any, seed: int) -> PretrainedLM:
    torch.manual_seed(seed)
    model = PretrainedLM(str(folder), folder, adapter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("wrap", [lambda m: m, Outer], ids=["alone", "nested"])
def test_round_trip(folder: Path, name: str, wrap: Any) -> None:
    ids = torch.randint(VOCAB, (2, 7))
    first, second = (loaded(folder, ADAPTERS[name], seed) for seed in (1, 2))
    state = wrap(first).state_dict()
    kept = {key.split("backbone.")[-1] for key in state if not key.startswith("head.")}
    trained = {n for n, p in first.named_parameters() if p.requires_grad}
    assert trained <= kept
    assert not any(".base_layer." in key or "embed" in key for key in kept)
    assert not torch.equal(first(ids).logits, second(ids).logits)
    report = wrap(second).load_state_dict(state, strict=True)
    assert report.missing_keys == report.unexpected_keys == []
    assert torch.equal(first(ids).logits, second(ids).logits)


def test_frozen_experts_are_kept_too(folder: Path) -> None:
    model = loaded(folder, ADAPTERS["frozen_experts"], 1)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {key for key in model.state_dict() if "lora_A" in key}.isdisjoint(trained)
    assert any("lora_A" in key for key in model.state_dict())


def test_without_an_adapter_there_is_no_state(folder: Path) -> None:
    model = loaded(folder, None, 1)
    assert model.state_dict() == {}
    assert model.load_state_dict({}).missing_keys == []


def test_state_shares_memory_and_keeps_variables_on_request(folder: Path) -> None:
    outer = Outer(loaded(folder, ADAPTERS["lora"], 1))
    own = dict(outer.named_parameters())
    kept = outer.state_dict(prefix="x.", keep_vars=True)
    assert kept
    assert all(value is own[key.removeprefix("x.")] for key, value in kept.items())


@pytest.mark.parametrize("assign", [False, True])
def test_loading_leaves_the_frozen_weights_alone(folder: Path, assign: bool) -> None:
    first, second = (loaded(folder, ADAPTERS["lora"], seed) for seed in (1, 2))
    frozen = {n: p.clone() for n, p in second.named_parameters() if not p.requires_grad}
    second.load_state_dict(first.state_dict(), assign=assign)
    own = dict(second.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in frozen.items())
    assert {n for n, p in own.items() if p.requires_grad}.isdisjoint(frozen)
    head = second.model.get_base_model()
    assert head.lm_head.weight is head.model.embed_tokens.weight


@pytest.mark.parametrize("wrap", [lambda m: m, Outer], ids=["alone", "nested"])
def test_what_does_not_fit_is_named(folder: Path, wrap: Any) -> None:
    model = wrap(loaded(folder, ADAPTERS["lora"], 1))
    state = model.state_dict()
    lost = next(key for key in state if "lora_A" in key)
    del state[lost]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{lost}"'):
        model.load_state_dict(state)
    state = model.state_dict()
    frozen = next(n for n, p in model.named_parameters() if "embed_tokens" in n)
    stranger = lost.replace("lora_A", "lora_C")
    before = dict(model.named_parameters())[frozen].clone()
    state |= {frozen: torch.zeros(VOCAB, 32), stranger: torch.zeros(1)}
    report = model.load_state_dict(state, strict=False)
    assert sorted(report.unexpected_keys) == sorted([frozen, stranger])
    assert torch.equal(dict(model.named_parameters())[frozen], before)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state)
    wrong = model.state_dict() | {lost: torch.zeros(3, 32)}
    with pytest.raises(RuntimeError, match="size mismatch for .*lora_A"):
        model.load_state_dict(wrong)
