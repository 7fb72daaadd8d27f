"""From config nodes to objects."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import routerlab as rl
from routerlab.core.config import ConfigError
from routerlab.core.instantiate import build, partial


@pytest.mark.parametrize("name", rl.available("router"))
def test_every_router_is_built_by_name(name: str) -> None:
    router = rl.build_router(name, d_model=16, num_experts=8)
    told = {"token_ids": torch.arange(6), "task_ids": torch.arange(2)}
    context = rl.RoutingContext(batch_size=2, sequence_length=3, **told)
    output = router(torch.randn(6, 16), context)
    assert output.router_probs.shape == (6, 8)


def test_knobs_of_the_file_can_be_set() -> None:
    router = rl.build_router("token_choice", d_model=16, num_experts=8, top_k=3)
    assert router(torch.randn(5, 16), None).top_k == 3


def test_an_unknown_knob_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'topk'.*'top_k'"):
        rl.build_router("token_choice", d_model=16, num_experts=8, topk=3)


def test_an_unknown_router_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="token_choice"):
        rl.build_router("token_chioce", d_model=16, num_experts=8)


def test_the_backbone_of_a_config_is_built() -> None:
    cfg = rl.compose("experiment=quickstart", "backbone.d_model=32", "backbone.num_layers=3")
    out = rl.build_backbone(cfg)(torch.zeros(2, 5, dtype=torch.long))
    assert out.logits.shape == (2, 5, cfg.backbone.vocab_size)
    assert list(out.router_outputs) == ["layers.00.moe", "layers.01.moe", "layers.02.moe"]


@pytest.mark.parametrize(
    "target", ["os.system", "builtins.eval", "subprocess.run", "shutil.rmtree"]
)
def test_targets_from_elsewhere_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="must come from routerlab"):
        partial(OmegaConf.create({"_target_": target}))


def test_a_nested_target_from_elsewhere_is_refused() -> None:
    node = {"_target_": "torch.nn.Identity", "inner": {"_target_": "os.remove", "path": "x"}}
    with pytest.raises(ConfigError, match=r"inner\._target_"):
        partial(OmegaConf.create(node))


def test_a_key_that_the_target_does_not_take_is_refused(tmp_path: Path) -> None:
    node = {"_target_": "routerlab.routers.token_choice.TokenChoice", "topk": 2}
    with pytest.raises(ConfigError, match=r"topk.*'top_k'"):
        build(OmegaConf.create(node), d_model=8, num_experts=4)


def test_a_key_of_the_parent_class_is_known_and_a_wrong_one_is_not() -> None:
    node = {"_target_": "routerlab.objectives.causal_lm.CausalLM", "micro_batches": 2}
    assert partial(OmegaConf.create(node)).keywords == {"micro_batches": 2}
    node = {"_target_": "routerlab.objectives.causal_lm.CausalLM", "micro_batch": 2}
    with pytest.raises(ConfigError, match=r"micro_batch: .*'micro_batches'"):
        partial(OmegaConf.create(node))
