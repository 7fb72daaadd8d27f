"""Decoders in directories: whole or not at all, and nothing foreign in them is called."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from routerlab.backbones.decoder import Decoder
from routerlab.backbones.saved import arguments_of, load_decoder, save_decoder, weights_of
from routerlab.balancers.expert_bias import ExpertBias
from routerlab.core.config import ConfigError, compose
from routerlab.core.layers import pick_layers
from routerlab.routers.expert_choice import ExpertChoice
from routerlab.routers.round_robin import RoundRobin
from routerlab.routers.token_choice import TokenChoice
from routerlab.training.build import build_backbone
from tests.helpers.language_models import VOCAB, tiny_tokenizer

TOP_2 = {"_target_": "routerlab.routers.token_choice.TokenChoice", "top_k": 2}
BIAS = {"_target_": "routerlab.balancers.expert_bias.ExpertBias", "rate": 0.01}
IDS = torch.arange(24).reshape(2, 12)


def decoder(balancer: Any = None, **changes: Any) -> Decoder:
    arguments: dict[str, Any] = {
        "vocab_size": VOCAB, "d_model": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
        "d_ff": 12, "num_experts": [4, 0, 4], "max_positions": 32, "dense_d_ff": 20,
        "num_shared_experts": 2, "qk_norm": True, "head_dim": 6, "rope_theta": 500.0,
        "rms_norm_eps": 1e-5, "tie_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    made = Decoder(partial(TokenChoice, top_k=2, balancer=balancer), **(arguments | changes))
    for name, buffer in made.named_buffers():
        if name.endswith("bias"):
            buffer.normal_()
    return made


@pytest.mark.parametrize(
    ("balancer", "changes"),
    [
        (None, {}),
        (BIAS, {"tie_embeddings": False, "num_experts": 4, "dense_d_ff": None}),
        (None, {"num_shared_experts": 0, "head_dim": None, "qk_norm": False}),
    ],
)
def test_there_and_back_again(
    balancer: dict[str, Any] | None, changes: dict[str, Any], tmp_path: Path
) -> None:
    saved = decoder(ExpertBias if balancer else None, **changes)
    save_decoder(tmp_path / "saved", saved, TOP_2, balancer, tiny_tokenizer())
    loaded = load_decoder(tmp_path / "saved")
    before, after = weights_of(saved), weights_of(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(saved(IDS).logits, loaded(IDS).logits)
    assert arguments_of(saved) == arguments_of(loaded)
    assert loaded.tokenizer.encode("abc") == tiny_tokenizer().encode("abc")
    if balancer:
        assert loaded.moe_layers["layers.01.moe"].router.balancer.rate == 0.01


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_decoder(tmp_path / "saved", decoder(), TOP_2)
    return tmp_path / "saved"


def test_a_part_learns_and_the_rest_stays(saved: Path) -> None:
    loaded = load_decoder(saved, trainable="routers", trainable_layers=1)
    learns = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert learns == {"layers.2.moe.router.gate.weight"}
    assert pick_layers(loaded.layer_names, 1, "trainable_layers") == ["layers.02.moe"]
    save_decoder(saved.with_name("again"), loaded, TOP_2)
    again = weights_of(load_decoder(saved.with_name("again")))
    assert all(torch.equal(again[key], value) for key, value in weights_of(decoder()).items())


@pytest.mark.parametrize(
    ("router", "kept", "told"),
    [
        (partial(ExpertChoice, capacity_factor=1.0), True, []),
        (partial(TokenChoice, top_k=1, normalize_weights=False, balancer=ExpertBias), True,
         ["2 tensors of the routers are fresh, such as layers.0.moe.router.balancer.bias"]),
        (partial(RoundRobin, top_k=2), False,
         ["2 tensors of the routers are dropped, such as layers.0.moe.router.gate.weight"]),
    ],
)  # fmt: skip
def test_other_routers_keep_what_fits(
    router: Callable[..., Any],
    kept: bool,
    told: list[str],
    saved: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    loaded = load_decoder(saved, router)
    layer = loaded.moe_layers["layers.02.moe"]
    assert type(layer.router) is getattr(router, "func", router)
    old = decoder().moe_layers["layers.02.moe"]
    assert torch.equal(layer.experts.down_proj, old.experts.down_proj)
    if kept:
        assert torch.equal(layer.router.gate.weight, old.router.gate.weight)
    said = [str(w.message) for w in recwarn if "of the routers" in str(w.message)]
    assert said == told


def test_backbone_saved_by_config(saved: Path) -> None:
    native = build_backbone(compose("backbone=saved", f"backbone.path={saved}"))
    assert torch.equal(native(IDS).logits, decoder()(IDS).logits)
    words = ["backbone=saved", f"backbone.path={saved}", "router=olmoe", "router.top_k=3"]
    other = build_backbone(compose(*words, "backbone.trainable=moe"))
    assert other.moe_layers["layers.00.moe"].router.top_k == 3
    assert not other.embed_tokens.weight.requires_grad


def test_nothing_is_overwritten_and_nothing_half_written(saved: Path) -> None:
    with pytest.raises(ValueError, match="saved': exists already and is not an empty directory"):
        save_decoder(saved, decoder(), TOP_2)
    broken = decoder()
    broken.moe_layers["layers.00.moe"].experts = torch.nn.Identity()
    broken.moe_layers["layers.00.moe"].experts.num_experts = 4
    with pytest.raises(ValueError, match="experts Identity: must be SwiGLU"):
        save_decoder(saved.with_name("new"), broken, TOP_2)
    (saved.parent / "empty").mkdir()
    save_decoder(saved.with_name("empty"), decoder(), TOP_2)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["empty", "saved"]


def edit(saved: Path, **changes: Any) -> None:
    settings = OmegaConf.to_container(OmegaConf.load(saved / "backbone.yaml"))
    (saved / "backbone.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings | changes)))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors: it was written"),
        (lambda d: cut(d / "model.safetensors"), "model.safetensors: cannot be read"),
        (lambda d: (d / "backbone.yaml").unlink(), "no saved decoder .it has no backbone.yaml"),
        (lambda d: (d / "backbone.yaml").write_text("{a: [1"), "backbone.yaml: cannot be read"),
        (lambda d: (d / "backbone.yaml").write_text("- 1"), "backbone.yaml: "),
        (lambda d: edit(d, decoder={"width": 3}), "backbone.yaml: decoder: "),
        (lambda d: edit(d, format=2), "format=2, with .*must be format 1"),
        (lambda d: edit(d, balancer=BIAS), "tensors are missing, too many or of another shape"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
    ],
)  # fmt: skip
def test_broken_directories_are_told(harm: Any, why: str, saved: Path) -> None:
    harm(saved)
    with pytest.raises(ValueError, match=why):
        load_decoder(saved)


@pytest.mark.parametrize(
    "target",
    [
        "torch.hub.load",
        "routerlab.core.download.subprocess.run",
        "routerlab.routers.token_choice.torch.hub.load",
        "routerlab.routers.nothing.Router",
        "routerlab.backbones.saved.load_decoder",
        "os.system",
        "system",
    ],
)
def test_foreign_targets_are_refused(target: str, saved: Path) -> None:
    edit(saved, router={"_target_": target})
    with pytest.raises(ValueError, match="_target_='?.*: must (be|come)|must come from"):
        load_decoder(saved)
    edit(saved, router=TOP_2 | {"top_k": {"deep": [{"_target_": target}]}})
    with pytest.raises(ValueError, match="must|cannot"):
        load_decoder(saved)


def test_a_users_router_is_loaded(saved: Path, tmp_path: Path) -> None:
    from routerlab.core.config import use_directory

    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "my_saved_router.py").write_text(
        "from routerlab.routers.token_choice import TokenChoice\n\n\n"
        "class Mine(TokenChoice):\n    pass\n"
    )
    edit(saved, router=TOP_2 | {"_target_": "my_saved_router.Mine"})
    with pytest.raises(ConfigError, match="my_saved_router.Mine"):
        load_decoder(saved)
    use_directory(tmp_path / "lab")
    assert type(load_decoder(saved).moe_layers["layers.00.moe"].router).__name__ == "Mine"


def test_directories_of_others_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        load_decoder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="use `routerlab import`"):
        load_decoder(tmp_path)
