"""``routerlab import``, ``export`` and ``upcycle``."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from routerlab.cli.main import main
from routerlab.training.evaluate import load_objective
from routerlab.training.run_directory import RunDirectory
from tests.convert.checkpoints import edit_tensors, tiny_checkpoint
from tests.helpers.language_models import save_tiny


def test_import_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours, again = (str(tmp_path / name) for name in ("theirs", "ours", "again"))
    save_tiny(Path(theirs), tiny_checkpoint("mixtral"))
    assert main(["import", theirs, "--out", ours, "--seed", "4"]) == 0
    assert main(["export", ours, "--out", again, "--family", "qwen2_moe"]) == 0
    said = capsys.readouterr().out
    assert "import (mixtral): certified" in said
    assert "export (qwen2_moe): certified" in said
    assert "100.0%" in said
    model = AutoModelForCausalLM.from_pretrained(again)
    assert model.config.norm_topk_prob is True


def test_a_lost_expert_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "theirs", tiny_checkpoint("mixtral"))
    lost = "layers.1.block_sparse_moe.experts.3."
    edit_tensors(tmp_path / "theirs", lambda t: {k: x for k, x in t.items() if lost not in k})
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 1
    said = capsys.readouterr().out
    assert "import (mixtral): FAILED" in said
    assert "FAILED: source tensors missing: model.layers.1.block_sparse_moe.experts.3.w1" in said
    assert not (tmp_path / "ours").exists()


def test_upcycle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "dense")
    out = ["--out", str(tmp_path / "moe")]
    assert main(["upcycle", str(tmp_path / "dense"), *out, "backbone.layers=1"]) == 0
    assert "upcycle (llama): certified" in capsys.readouterr().out
    out = ["--out", str(tmp_path / "other")]
    words = ["router=olmoe", "backbone.num_experts=8"]
    assert main(["upcycle", *out, str(tmp_path / "dense"), *words]) == 1
    assert "FAILED: logits differ" in capsys.readouterr().out


def test_a_run_is_exported(finished_run: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished_run), "--out", str(tmp_path / "theirs")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    backbone = load_objective(RunDirectory.existing(finished_run))[0].backbone.eval()
    ids = torch.arange(32)[None] + 64
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, backbone(ids).logits, rtol=1e-5, atol=1e-5)
    written = json.loads((tmp_path / "theirs" / "certificate.json").read_text())
    assert written["family"] == "qwen3_moe"


@pytest.mark.parametrize("command", ["import", "export", "upcycle"])
def test_help_and_bad_input(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: routerlab {command}" in capsys.readouterr().out
    assert main([command, "x"]) == 2
    assert "--out" in capsys.readouterr().err
    assert main([command, str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
