"""Names, and what is said about wrong ones."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import routerlab as rl
from routerlab.core.config import ConfigError, compose, config_dir, describe, nearest, quoted

ROOT = Path(__file__).parents[2]
GROUPS = (
    "backbone", "router", "experts", "loss", "diagnostic", "objective", "data", "optimizer",
    "trainer", "callback", "logger", "paths", "launcher", "resources",
)  # fmt: skip


def test_the_repository_comes_before_a_copy_in_the_package() -> None:
    assert config_dir() == ROOT / "configs"


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_composes_and_says_what_it_is(group: str) -> None:
    many = {"loss", "diagnostic", "callback", "logger"}
    for name in rl.available(group):
        choice = f"{group}=[{name}]" if group in many else f"{group}={name}"
        assert group in rl.compose(choice)
        assert len(describe(group, name)) > 10


def test_every_experiment_composes() -> None:
    for name in rl.available("experiment"):
        cfg = rl.compose(f"experiment={name}")
        assert OmegaConf.missing_keys(cfg) <= {"backbone.path"}  # of models that users have
        OmegaConf.to_container(cfg, resolve=True)


def test_router_tuning_leaves_a_wrapped_model_its_routers() -> None:
    wrapped = rl.compose("experiment=router_tuning", "backbone.path=there")
    assert wrapped.router is None  # native
    assert wrapped.backbone["_target_"].endswith("HuggingFaceMoE")
    upcycled = rl.compose("experiment=upcycled_tuning")
    assert upcycled.router["_target_"].endswith("TokenChoice")


@pytest.mark.parametrize(
    ("word", "wrong", "right"),
    [
        ("router=tokn_choice", "router=tokn_choice", "token_choice"),
        ("loss=[load_balance]", "loss=load_balance", "load_balancing"),
        ("router.topk=1", "router.topk", "router.top_k"),
        ("backbone.dmodel=64", "backbone.dmodel", "backbone.d_model"),
        ("loss.router_z.wieght=1", "loss.router_z.wieght", "loss.router_z.weight"),
        ("rooter=token_choice", "rooter", "router"),
        ("experiment=quikstart", "experiment=quikstart", "quickstart"),
        ("baselines={lora: ['adapter=lora']}", "baselines: ", "+baselines.NAME"),
    ],
)
def test_a_wrong_name_is_named_with_the_nearest_right_ones(
    word: str, wrong: str, right: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        rl.compose(word)
    assert wrong in str(caught.value)
    assert right in str(caught.value)


def test_an_unknown_group_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="router"):
        rl.available("routers")


def test_nearest_lists_all_names_when_none_is_close() -> None:
    assert nearest("zzzz", ["abc", "def"]) == "available: abc, def"


def test_a_wheel_brings_the_configs_and_finds_them(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        check=True,
    )
    wheel = next(tmp_path.glob("routerlab-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        assert "routerlab/configs/train.yaml" in archive.namelist()
        assert "routerlab/reports/report.css" in archive.namelist()
    code = (
        "import routerlab as rl, routerlab.core.config as c; print(c.config_dir()); "
        "print(rl.available('router')); print(rl.compose('experiment=quickstart').name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout.splitlines() == [
        str(tmp_path / "site" / "routerlab" / "configs"),
        str(rl.available("router")),
        "quickstart",
    ]


@pytest.mark.parametrize(
    "text", ["a b", "it's", "back\\slash", "end\\", "a,b=c", "{x: [1]}", "$HOME", ""]
)
def test_a_quoted_text_is_read_as_it_was(text: str) -> None:
    assert compose(f"run_dir={quoted(text)}").run_dir == text
