"""`routerlab audit-loss`: what it reads, what it refuses, what it says and writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from routerlab.analysis import trace
from routerlab.cli.audit_loss import main, read_logits


@pytest.fixture
def logits() -> torch.Tensor:
    """[L, T, E]."""
    return torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))


def write(path: Path, content: Any) -> Path:
    """A tensor, or tensors by name, in the format that the file's name says."""
    if path.suffix == ".safetensors":
        content = content if isinstance(content, dict) else {"logits": content}
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    elif path.suffix == ".npz":
        content = content if isinstance(content, dict) else {"logits": content}
        np.savez(path, **{name: tensor.numpy() for name, tensor in content.items()})
    else:
        np.save(path, content.numpy())
    return path


def figures(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "audit.json"
    assert main([*arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_one_array_of_all_layers(suffix: str, logits: torch.Tensor, tmp_path: Path) -> None:
    names, found, valid = read_logits(write(tmp_path / f"all{suffix}", logits))
    assert names == ["layers.00", "layers.01", "layers.02"]
    assert torch.equal(found, logits)
    assert valid is None


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_by_name_come_in_the_order_of_depth(
    suffix: str, logits: torch.Tensor, tmp_path: Path
) -> None:
    named = {"layer_10": logits[2], "layer_2": logits[1], "layer_1": logits[0]}
    named["attention_mask"] = (torch.arange(8) < 6).view(2, 4).long()
    names, found, valid = read_logits(write(tmp_path / f"named{suffix}", named))
    assert names == ["layer_1", "layer_2", "layer_10"]
    assert torch.equal(found, logits)
    assert valid is not None
    assert valid.tolist() == [True] * 6 + [False] * 2


def test_half_precision_and_a_single_layer(logits: torch.Tensor, tmp_path: Path) -> None:
    low = logits[0].bfloat16()
    found = figures(tmp_path, "--logits", str(write(tmp_path / "low.safetensors", {"only": low})))
    assert [layer["name"] for layer in found["layers"]] == ["only"]
    high = figures(tmp_path, "--logits", str(write(tmp_path / "high.npy", low.float())))
    assert found["rules"] == high["rules"]
    assert high["layers"][0]["name"] == "layers.00"


def test_collapsed_layers_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collapsed = torch.full((4, 64, 4), -20.0)
    for layer in range(4):
        collapsed[layer, :, layer] = 20.0
    file = str(write(tmp_path / "collapsed.npy", collapsed))
    found = figures(tmp_path, "--logits", file, "--top-k", "1")  # warnings do not fail
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: transformers (1.00) looks balanced and hides layers.00 (4.00" in said
    assert "alpha_ours = alpha_theirs x value at balance" in said
    values = {row["rule"]["name"]: row for row in found["rules"]}
    assert values["transformers"]["value"] == pytest.approx(1.0)
    assert len(values["transformers"]["hides"]) == 4
    assert values["Megatron aux_loss"]["value"] == pytest.approx(16.0)
    assert values["Megatron aux_loss"]["at_balance"] == 4
    assert found["source"] == file
    assert (found["num_tokens"], found["num_experts"], found["top_k"]) == (64, 4, 1)
    assert all(layer["collapsed"] for layer in found["layers"])


def test_names_are_printed_as_they_are(
    logits: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "odd.safetensors", {"[red]a": logits[0]})
    assert main(["--logits", str(file)]) == 0
    assert "[red]a" in capsys.readouterr().out


def test_the_mask_and_micro_batches_of_a_file(logits: torch.Tensor, tmp_path: Path) -> None:
    mask = torch.tensor([1, 1, 1, 0] * 2)
    file = str(write(tmp_path / "masked.npz", {"z": logits, "attention_mask": mask}))
    found = figures(tmp_path, "--logits", file, "--micro-batches", "2")
    assert (found["num_tokens"], found["micro_batches"]) == (6, 2)
    assert found["top_k"] == 2  # the default


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(2, 3, 4, 5), r"has array (2, 3, 4, 5)"),
        (torch.zeros(5), "needs one [L, T, E] array or [T, E] arrays alike"),
        (torch.zeros(2, 0, 4), "is empty"),
        (torch.zeros(2, 3, 4, dtype=torch.long), "is torch.int64, not floating point"),
        (torch.full((2, 3, 4), torch.nan), "layers.00: 12 of 12 logits are not finite"),
    ],
)
def test_bad_arrays(
    content: torch.Tensor, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--logits", str(write(tmp_path / "bad.npy", content))]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(3, 4), "b": torch.zeros(3, 5)}, "has a (3, 4), b (3, 5)"),
        ({"a": torch.zeros(3, 4), "attention_mask": torch.ones(2)}, "is not of 3 tokens"),
        ({"attention_mask": torch.ones(2)}, "holds no logits"),
    ],
)
def test_bad_collections(
    content: dict[str, torch.Tensor],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--logits", str(write(tmp_path / "bad.safetensors", content))]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".txt"])
def test_bad_files(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / f"bad{suffix}"
    assert main(["--logits", str(file)]) == 2
    assert "no such file" in capsys.readouterr().err
    file.write_text("not at all")
    assert main(["--logits", str(file)]) == 2
    expected = "must end in .npy" if suffix == ".txt" else "cannot be read"
    assert f"{file}: {expected}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "0"], "top_k=0: must be from 1 to the 4 experts"),
        (["--top-k", "5"], "top_k=5: must be from 1 to the 4 experts"),
        (["--micro-batches", "3"], "micro_batches=3: must divide the 8 tokens"),
        (["--micro-batches", "0"], "--micro-batches=0: must be at least 1"),
        (["--sequences", "4"], "--sequences is for --run"),
        (["--json", "no/such/folder/x.json"], "its folder does not exist"),
        (["--run", "somewhere"], "not allowed with argument --logits"),
        (["--top-k", "many"], "invalid int value"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    logits: torch.Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path / "good.npy", logits)
    assert main(["--logits", str(file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_a_source_the_usage_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "--logits" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_a_run_is_judged_by_its_own_picks(finished_run: Path, tmp_path: Path) -> None:
    found = figures(tmp_path, "--run", str(finished_run), "--sequences", "4")
    assert found["source"].endswith("step_000004.ckpt")
    recorded = trace.load(finished_run)  # of the same 4 sequences
    assert [layer["name"] for layer in found["layers"]] == list(recorded.layers)
    assert found["num_tokens"] == recorded.input_ids.numel()
    for layer, picks in zip(found["layers"], recorded.layers.values(), strict=True):
        load = torch.bincount(picks.expert_indices, minlength=4) / len(picks.expert_indices)
        assert layer["max_violation"] == pytest.approx(4 * float(load.max()) - 1, abs=1e-6)
        assert layer["effective_experts"] == pytest.approx(1 / float(load.square().sum()))
    assert found["top_k"] == 2
    assert [row["normalized"] for row in found["rules"]] == pytest.approx([1] * 10, rel=0.5)


def test_a_run_in_micro_batches(finished_run: Path, tmp_path: Path) -> None:
    run = ["--run", str(finished_run), "--sequences", "4"]
    whole, cut = figures(tmp_path, *run), figures(tmp_path, *run, "--micro-batches", "2")
    assert cut["micro_batches"] == 2
    assert cut["rules"][0]["value"] == pytest.approx(whole["rules"][0]["value"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "2"], "--top-k is for --logits"),
        (["--sequences", "0"], "--sequences=0: must be at least 1"),
        (["--sequences", "4", "--micro-batches", "3"], "must divide the 4 sequences"),
    ],
)
def test_bad_arguments_of_a_run(
    arguments: list[str],
    message: str,
    finished_run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--run", str(finished_run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_reading_the_arguments_does_not_import_torch() -> None:
    code = (
        "import sys; from routerlab.cli.audit_loss import main; main([]); main(['--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
