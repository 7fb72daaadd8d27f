"""Runs of mixtures that others trained: their own routers, or ours in their place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import routerlab as rl
from routerlab.cli.main import main
from routerlab.core.config import ConfigError, compose
from routerlab.training.evaluate import load_objective
from routerlab.training.run_directory import RunDirectory
from routerlab.training.train import train
from tests.helpers.language_models import save_tiny
from tests.helpers.moe_models import tiny_moe

WRAPPED = ("backbone=hugging_face", "trainer.max_steps=2", "logger=[]")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE and its tokenizer, in a folder."""
    return save_tiny(tmp_path_factory.mktemp("olmoe"), tiny_moe("olmoe"))


def finished(words: list[str]) -> tuple[RunDirectory, dict[str, Any]]:
    run = train(compose(*words), words)
    assert (run.path / "report.html").is_file()
    assert (run.path / "traces" / "validation.safetensors").is_file()
    return run, json.loads((run.path / "summary.json").read_text())


@pytest.fixture
def text_words(tiny_words: Callable[..., list[str]], base: Path) -> Callable[..., list[str]]:
    """Words of a run on text, as the model's own tokenizer cuts it."""
    own = [word for word in tiny_words() if not word.startswith("backbone.")]
    where = [f"backbone.path={base}", f"data.tokenizer={base / 'tokenizer.json'}"]
    return lambda *more: [*own, *WRAPPED, *where, *more]


def test_native_routers_learn_from_text(text_words: Callable[..., list[str]]) -> None:
    run, found = finished(text_words("backbone.trainable=routers"))
    assert found["parameters"]["trainable"] == 3 * 8 * 32
    assert (found["top_k"], found["num_experts"]) == (2, [8, 8, 8])
    assert all("load_entropy" in layer for layer in found["layers"])
    objective, _, path = load_objective(run)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert len(saved) == 3
    layer = objective.backbone.moe_layers["layers.01.moe"]
    key = "backbone.model.model.layers.1.mlp.gate.weight"
    assert torch.equal(layer.router.gate.weight, saved[key])
    assert not torch.equal(saved[key], tiny_moe("olmoe").model.layers[1].mlp.gate.weight)


def test_experts_that_choose_take_over(text_words: Callable[..., list[str]]) -> None:
    words = text_words("router=expert_choice", "router.group=batch", "loss=[router_z]")
    with pytest.raises(ValueError, match="would leak the future"):
        finished(words)
    _, found = finished([*words, "objective.allow_noncausal=true"])
    assert found["looks_ahead"] == "in evaluation"
    assert found["parameters"]["trainable"] == found["parameters"]["total"]


def test_tasks_tune_routers(
    task_words: Callable[..., list[str]], base: Path, tmp_path: Path
) -> None:
    fitting = ("experiment=", "backbone.path=", "optimizer.", "paths.output_dir=")
    words = [word for word in task_words() if not word.startswith(fitting)]
    words += ["objective=finetune", *WRAPPED, f"backbone.path={base}", "evaluate_base=true"]
    words += [f"paths.output_dir={tmp_path}", "diagnostic=[expert_load,router_entropy]"]
    run, found = finished([*words, "backbone.trainable=routers", "backbone.trainable_layers=2"])
    assert found["parameters"]["trainable"] == 2 * 8 * 32
    assert found["base"]["items"] == found["val"]["items"]
    assert run.read_json("status.json")["state"] == "done"  # type: ignore[index]


def test_native_is_the_default_and_any_router_wins_over_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compose("backbone=hugging_face").router is None
    assert compose("backbone=hugging_face", "router=native").router is None
    explicit = compose("backbone=hugging_face", "router=expert_choice", "router.capacity_factor=1")
    assert explicit.router.capacity_factor == 1
    assert compose("router=switch").router.top_k == 1
    assert main(["train", "--cfg", "job", "backbone=hugging_face"]) == 0
    assert "router: null" in capsys.readouterr().out


def test_native_is_no_router_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert "native" not in rl.available("router")
    assert main(["routers"]) == 0
    assert "native" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="router: backbone Decoder needs one"):
        rl.build_backbone(compose("router=native"))


def test_what_does_not_go_with_native_routers_is_refused(
    text_words: Callable[..., list[str]],
) -> None:
    def built(*words: str) -> Any:
        return rl.build_backbone(compose(*text_words(*words)))

    with pytest.raises(ConfigError, match="balancer: goes with a router of ours"):
        built("balancer=expert_bias")
    with pytest.raises(ConfigError, match="schedule: HuggingFaceMoE has no layers to build"):
        built("schedule=[ascending]")
    with pytest.raises(ConfigError, match="adapter: backbone HuggingFaceMoE"):
        built("adapter=lora")
    with pytest.raises(ConfigError, match=r"backbone.path: must be given a value"):
        rl.build_backbone(compose("backbone=hugging_face"))
    with pytest.raises(ConfigError, match="did you mean 'native'"):
        compose("backbone=hugging_face", "router=nativ")
