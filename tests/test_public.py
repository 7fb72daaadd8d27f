"""The public surface: the names that scripts and notebooks of others use."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import routerlab as rl


def test_the_names_are_there() -> None:
    assert set(dir(rl)) >= {
        "compose", "build_backbone", "build_router", "MoE", "available", "trace", "compare",
        "RouterOutput", "RoutingContext", "routing_agreement", "routing_history",
    }  # fmt: skip
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = rl.nothing_here


def test_a_config_becomes_a_model_that_returns_its_routing() -> None:
    cfg = rl.compose("experiment=quickstart", "router=token_choice", "router.top_k=3")
    model = rl.build_backbone(cfg)
    assert isinstance(model, torch.nn.Module)
    out = model(torch.randint(0, 256, (2, 16)))
    assert out.logits.shape == (2, 16, 256)
    assert [record.top_k for record in out.router_outputs.values()] == [3] * cfg.backbone.num_layers


def test_a_layer_is_built_without_a_config() -> None:
    router = rl.build_router("token_choice", d_model=64, num_experts=8, top_k=2)
    layer = rl.MoE(d_model=64, d_ff=128, num_experts=8, router=router)
    x = torch.randn(3, 5, 64)
    y, output = layer(x)
    assert y.shape == x.shape
    assert isinstance(output, rl.RouterOutput)
    assert int(output.tokens_per_expert.sum()) == 3 * 5 * 2
    again, _ = layer(x, rl.RoutingContext(batch_size=3, sequence_length=5))
    assert torch.equal(again, y)


def test_what_is_available_is_what_lies_in_configs() -> None:
    folder = Path(__file__).parents[1] / "configs" / "router"
    names = {path.stem for path in folder.glob("*.yaml")}
    assert rl.available("router") == sorted(names - {"native"})  # which is no router of ours


def test_runs_are_compared_and_traces_loaded(finished_run: Path) -> None:
    assert list(rl.compare([finished_run]).index) == [finished_run.name]
    assert rl.trace.load(finished_run / "traces" / "validation.safetensors").layers
    agreed = rl.routing_agreement(str(finished_run), finished_run)
    assert [layer.agreement for layer in agreed] == [1.0] * len(agreed)
    with pytest.raises(ValueError, match="trace_validations=true"):
        rl.routing_history(str(finished_run))


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a routerlab trace"):
        rl.trace.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no such trace"):
        rl.trace.load(tmp_path / "nothing")


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, routerlab; print('torch' in sys.modules, 'hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
