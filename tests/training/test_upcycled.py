"""Fine-tuning of models with mixtures of their own: upcycled ones and decoders in a directory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.backbones.saved import save_decoder
from routerlab.core.config import ConfigError, compose
from routerlab.training.evaluate import load_objective
from routerlab.training.run_directory import RunDirectory
from routerlab.training.train import train
from tests.helpers.language_models import VOCAB, save_tiny, tiny_tokenizer
from tests.helpers.models import tiny_decoder

OURS = ("~adapter", "router=token_choice", "balancer=none", "loss=[load_balancing]")
UPCYCLED = ("backbone=upcycled", *OURS, "backbone.num_experts=4", "optimizer.optimizer.lr=0.01")
GATES = [f"backbone.layers.{i}.moe.router.gate.weight" for i in (0, 1)]


def weights(run: Path, step: int = 4) -> dict[str, Tensor]:
    (path,) = (run / "checkpoints").glob(f"step_*0{step}.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


def test_experts_and_routers_of_an_upcycled_model_learn(tune: Callable[..., Path]) -> None:
    run = tune(*UPCYCLED, "backbone.trainable=moe", "backbone.layers=1", "name=moe")
    found = json.loads((run / "summary.json").read_text())
    assert found["val"]["loss"] != found["base"]["loss"]
    assert [layer["layer"] for layer in found["layers"]] == ["layers.01"]
    experts, gate = 4 * 3 * 32 * 48, 4 * 32
    assert found["parameters"]["trainable"] == experts + gate
    prefix = "backbone.layers.1.moe."
    assert sorted(weights(run)) == [
        f"{prefix}experts.down_proj", f"{prefix}experts.gate_up_proj", f"{prefix}router.gate.weight"
    ]  # fmt: skip
    objective, data, _ = load_objective(RunDirectory.existing(run))
    for name, value in objective.state_dict().items():
        assert torch.equal(value, weights(run)[name])
    assert data.task_names == ["vowel", "double"]


def test_routers_alone_learn_and_go_on_after_a_stop(
    tune: Callable[..., Path], tmp_path: Path
) -> None:
    words = ("backbone.trainable=routers", "backbone.trainable_layers=1", "router.init_std=1.0")
    run = tune(*UPCYCLED, *words, "backbone.noise_std=0.5", "name=routers")
    before, after = weights(run, 2), weights(run)
    assert sorted(after) == GATES
    assert torch.equal(before[GATES[0]], after[GATES[0]])
    assert not torch.equal(before[GATES[1]], after[GATES[1]])
    stopped = Path(shutil.copytree(run, tmp_path / "stopped"))
    for path in (stopped / "checkpoints").glob("*4.ckpt"):
        path.unlink()
    again = train(compose(f"resume={stopped}"), [f"resume={stopped}"]).path
    for name, value in weights(again).items():
        assert torch.equal(value, after[name])
    scores = [json.loads((path / "summary.json").read_text())["val"] for path in (run, again)]
    assert scores[0] == scores[1]


def saved(folder: Path) -> Path:
    """A decoder of ours with the tokenizer of characters."""
    router = {"_target_": "routerlab.routers.token_choice.TokenChoice", "top_k": 2}
    model = tiny_decoder(vocab_size=VOCAB, max_positions=64).float()
    save_decoder(folder, model, router, tokenizer=tiny_tokenizer())
    return folder


def test_a_saved_decoder_reads_tasks_by_its_own_tokenizer(
    tune: Callable[..., Path], tmp_path: Path
) -> None:
    run = tune(
        "backbone=saved", *OURS, f"backbone.path={saved(tmp_path / 'saved')}", "name=saved",
        "backbone.trainable=routers", "evaluate_base=false", "trainer.max_steps=2",
    )  # fmt: skip
    assert sorted(weights(run, 2)) == GATES


def test_a_fresh_decoder_reads_tasks_by_a_given_tokenizer(
    tune_words: list[str], tmp_path: Path
) -> None:
    words = [word for word in tune_words if not word.startswith("backbone.path=")]
    words += ["backbone=decoder", *OURS, "backbone.d_model=16", "backbone.d_ff=16"]
    words += ["trainer.max_steps=2", "evaluate_base=false", "name=fresh"]
    with pytest.raises(ConfigError, match=r"data.tokenizer: must be given, since this backbone"):
        train(compose(*words), words)
    words.append(f"data.tokenizer={save_tiny(tmp_path / 'tokenizer')}")
    run = train(compose(*words), words).path
    assert json.loads((run / "summary.json").read_text())["val"]["items"] == 16


@pytest.fixture
def tune_words(task_words: Callable[..., list[str]]) -> list[str]:
    return task_words()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["backbone.trainable=none"], r"backbone.trainable=none: no parameter learns; use"),
        (
            ["backbone.trainable=routers", "router=hash", "loss=[]"],
            r"backbone.trainable=routers: no parameter learns; use .*where the router has",
        ),
        (["adapter=lora"], r"adapter: backbone upcycled is trained as a whole and takes none"),
        (["schedule=[pyramid]"], r"schedule: upcycled has no layers to build"),
        (["backbone.layers=7"], r"layers=7: must be from 1 to the 2 layers"),
        (["data=four_domains", "data.tokenizer=bytes", "objective=causal_lm"], r"bytes: a pretr"),
    ],
)
def test_what_does_not_go_together(
    tune_words: list[str], words: list[str], message: str, tmp_path: Path
) -> None:
    given: Any = [*tune_words, *UPCYCLED, *words, f"run_dir={tmp_path / 'run'}"]
    if "adapter=lora" in words:
        given.remove("~adapter")
    if "data=four_domains" in words:
        given = [word for word in given if not word.startswith(("data.", "data=jsonl"))]
        given.append("data.tokenizer=bytes")
    with pytest.raises(ValueError, match=message):
        train(compose(*given), given)
    assert not (tmp_path / "run").exists()
