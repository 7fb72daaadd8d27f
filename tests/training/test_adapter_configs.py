"""Adapters in the config: who chooses the router, what goes together, what is refused and how."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import routerlab.core.config as config
from routerlab.adapters import MixtureOfLoraConfig
from routerlab.cli.main import main
from routerlab.core.config import ConfigError, compose, use_directory
from routerlab.training.baselines import planned
from routerlab.training.build import build_adapter
from tests.training.conftest import REMIX

ROUTED = """\
# A mixture with a router of its own.
defaults:
  - override /router@_global_.router: threshold
  - override /loss@_global_.loss: [router_entropy]
_target_: routerlab.adapters.MixtureOfLoraConfig
r: 4
"""
PLAIN = """\
# Nothing to route.
defaults:
  - override /router@_global_.router: null
  - override /loss@_global_.loss: []
_target_: peft.LoraConfig
r: 4
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's config directory with two adapters."""
    monkeypatch.setattr(config, "_user_dirs", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in (("routed", ROUTED), ("plain", PLAIN)):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / f"{name}.yaml").write_text(text)
    use_directory(tmp_path)
    return tmp_path


def router(*words: str) -> str | None:
    cfg = compose(*words)
    return cfg.router["_target_"].rsplit(".", 1)[-1] if cfg.get("router") else None


def test_an_adapter_chooses_the_router_and_the_command_line_wins(lab: Path) -> None:
    assert router() == "TokenChoice"
    assert not compose().get("adapter")
    assert router("adapter=routed") == "Threshold"
    assert router("adapter=plain") is None
    assert router("adapter=routed", "router=top_p") == "TopP"
    assert router("adapter=plain", "router=top_p") == "TopP"
    assert router("experiment=quickstart", "adapter=plain") is None


def test_an_adapter_chooses_the_losses_and_the_command_line_wins(lab: Path) -> None:
    assert list(compose("adapter=routed").loss) == ["router_entropy"]
    assert not compose("adapter=plain").get("loss")
    assert list(compose("adapter=routed", "router=switch").loss) == ["router_entropy"]
    assert list(compose("adapter=routed", "loss=[router_z]").loss) == ["router_z"]


def test_users_adapters_are_listed(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["plain", "Nothing to route."] in lines
    assert [line[0] for line in lines] == config.available("adapter")


def test_a_mixture_gets_the_router_and_its_balancer() -> None:
    made = build_adapter(compose("adapter=mixlora", "router=token_choice", "balancer=expert_bias"))
    assert isinstance(made, MixtureOfLoraConfig)
    assert made.router["_target_"].endswith("TokenChoice")
    assert made.router["balancer"]["_target_"].endswith("ExpertBias")
    assert "balancer" not in build_adapter(compose("adapter=mixlora")).router
    assert build_adapter(compose()) is None


def test_skills_know_how_many_tasks_there_are() -> None:
    tasks = "data.tasks={a: sarcasm, b: quartz, c: logiqa}"
    words = ("data=jsonl", tasks, "adapter=poly")
    assert build_adapter(compose(*words)).num_tasks == 3
    assert build_adapter(compose(*words, "adapter.num_tasks=5")).num_tasks == 5
    with pytest.raises(ConfigError, match=r"adapter\.num_tasks=2: data\.tasks has 3 tasks"):
        build_adapter(compose(*words, "adapter.num_tasks=2"))
    with pytest.raises(ConfigError, match=r"adapter\.num_tasks: .* the data have none"):
        build_adapter(compose("adapter=poly"))


def test_baselines_are_composed_from_the_words_of_the_run() -> None:
    words = ["experiment=remix_quickstart", "seed=3", "adapter.top_k=2", "run_dir=here"]
    (plan,) = planned(compose(*words), words)
    assert plan.key == "baselines.lora"
    assert plan.cfg.adapter["_target_"] == "peft.LoraConfig"
    assert plan.cfg.seed == 3
    assert plan.cfg.run_dir is None
    assert not plan.cfg.evaluate_base
    assert not plan.cfg.get("baselines")
    main_run = compose(*words)
    assert plan.cfg.adapter.r == 4 * main_run.adapter.r  # of the four experts that it activates
    assert planned(compose(*words, "~baselines"), [*words, "~baselines"]) == []


BASELINES = {
    "{lora: 3}": ["baselines.lora", "list of overrides"],
    "{lora: ['adapter=lroa']}": ["baselines.lora", "adapter=lroa", "'lora'"],
    "{lora: ['adapter.rank=3']}": ["baselines.lora", "adapter.rank"],
    "{a/b: []}": ["baselines.a/b", "letters"],
}


@pytest.mark.parametrize(("given", "parts"), BASELINES.items())
def test_wrong_baselines_are_refused(given: str, parts: list[str]) -> None:
    import yaml

    cfg = compose("experiment=finetune", "adapter=lora")
    cfg.baselines = yaml.safe_load(given)
    with pytest.raises(ConfigError) as caught:
        planned(cfg, ["experiment=finetune", "adapter=lora"])
    for part in parts:
        assert part in str(caught.value)


WRONG: dict[tuple[str, ...], list[str]] = {
    ("~adapter",): ["adapter: trainable parameters: none", "remix"],
    ("adapter=lora", "router=switch"): ["router TokenChoice", "plain LoRA", "no router"],
    ("adapter=poly", "router=switch"): ["router="],
    ("adapter=mixlora", "router=sinkhorn", "balancer=bip"): ["balancer BIP", "Sinkhorn"],
    (*REMIX, "adapter.top_k=5"): ["top_k=5", "at most 4"],
    (*REMIX, "objective.num_samples=1"): ["num_samples=1", "at least 2"],
    ("adapter=lora", "adapter.target_modules=[gate_porj]"): ["gate_porj"],
    ("adapter=mixlora", "adapter.target_modules=[gate_porj]"): ["gate_porj"],
    ("adapter=remix", "adapter.rank=3"): ["adapter.rank", "no such key"],
    ("adapter=lora", "objective.num_samples=3"): ["num_samples=3", "no router samples"],
    ("adapter=lora", "backbone.path=/nowhere"): ["/nowhere"],
    ("adapter=lora", "backbone=decoder"): ["adapter", "backbone Decoder", "pretrained"],
    ("adapter=lora", "objective=causal_lm"): ["objective CausalLM", "objective=finetune"],
    ("adapter=lora", "data.max_length=8"): ["max_length"],
    ("adapter=lora", "data.max_length=500"): ["data.max_length=500", "max_positions=128"],
    ("adapter=lora", "schedule=[descending]"): ["schedule", "experts by layer"],
    ("adapter=lora", "data.final_val_items=0"): ["final_val_items"],
    ("adapter=remix", "schedule=[linear]", "schedule.linear.target=router.top_k",
     "schedule.linear.start=2", "schedule.linear.end=9"): ["schedule.linear", "top_k=9"],
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "parts"), WRONG.items())
def test_what_does_not_go_together_is_refused_before_the_run(
    wrong: tuple[str, ...],
    parts: list[str],
    task_words: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = {word.split("=")[0] for word in wrong}
    words = [word for word in task_words() if word.split("=")[0] not in keys]
    if "backbone=decoder" in wrong:
        words = [word for word in words if not word.startswith("backbone.path")]
    assert main(["train", *words, *wrong, f"run_dir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_text_does_not_go_with_an_objective_of_answers(
    tiny_words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny_words("objective=finetune")]) == 2
    assert "needs prompts and answers" in capsys.readouterr().err
