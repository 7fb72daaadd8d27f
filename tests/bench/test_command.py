"""`routerlab bench`: arguments, exit codes, the file."""

import json
import subprocess
import sys

import pytest
import torch

from routerlab.bench import command, contestants
from routerlab.bench.command import main
from routerlab.dispatch.loop import Loop

SMALL = "24,8,16,4,2;16,8,8,4,3"
FAST = ["--seconds", "0.001"]


def test_a_run_writes_every_cell_that_was_asked_for(tmp_path, capsys):
    file = tmp_path / "bench.json"
    paths = "autograd,loop,hf_grouped_mm,hf_eager"
    arguments = ["--shapes", SMALL, "--paths", paths, "--json", str(file), "--threads", "1"]
    before = torch.get_num_threads()
    assert main(["layer", *arguments, *FAST, "--no-step"]) == 0
    assert torch.get_num_threads() == before
    found = json.loads(file.read_text())
    cells = {(row["shape"], row["dtype"], row["path"]) for row in found["rows"]}
    assert cells == {
        (shape, dtype, path)
        for shape in SMALL.split(";")
        for dtype in ("float32", "bf16")
        for path in ("dense", *paths.split(","))
    }
    assert len(found["rows"]) == len(cells)
    assert found["step"] is None
    assert found["environment"]["threads"] == 1
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["cpu"]
    assert "hf_eager" in capsys.readouterr().out


def test_the_step_is_in_the_file(tmp_path, monkeypatch):
    from routerlab.bench import step

    small = step.StepSize(32, 16, 2, 2, 4, 2, 16, batch_size=2, sequence_length=8)
    monkeypatch.setattr(step, "StepSize", lambda: small)
    file = tmp_path / "bench.json"
    assert main(["layer", "--shapes", "24,8,16,4,2", "--paths", "autograd", "--json", str(file),
                 "--dtypes", "float32", *FAST]) == 0  # fmt: skip
    found = json.loads(file.read_text())["step"]
    assert {"milliseconds", "losses_percent", "diagnostics_percent", "percent"} <= set(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1,2,3"], "shape='1,2,3': must be five whole numbers T,D,F,E,K"),
        (["--shapes", "8,8,8,4,x"], "shape='8,8,8,4,x'"),
        (["--shapes", "8,0,8,4,2"], "d_model must be at least 1"),
        (["--shapes", "8,8,8,4,5"], "K=5 must be from 2"),
        (["--shapes", "8,8,8,4,1"], "K=1 must be from 2"),
        (["--shapes", ";"], "names no shape"),
        (["--dtypes", "float8"], "dtypes='float8': must be among float32, bf16"),
        (["--paths", "autograd,magic"], "paths='magic': must be among auto, blocks"),
        (["--seconds", "0"], "--seconds=0.0: must be above 0"),
        (["--threads", "0"], "--threads=0: must be at least 1"),
        (["--json", "no/such/folder/x.json"], "its folder does not exist"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["layer", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert main(["layer", "--device", "cuda"]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_without_a_subject_the_subjects_are_listed(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in command.SUBJECTS)
    assert main(["cake"]) == 2
    assert main(["--help"]) == 0


def test_a_refused_contestant_fails_the_run(monkeypatch, capsys):
    def broken(moe):
        right = contestants.build_ours(moe, Loop)
        return contestants.Contestant(lambda x: 2 * right.forward(x), right.weights)

    monkeypatch.setitem(contestants.PATHS, "broken", broken)
    arguments = ["--shapes", "24,8,16,4,2", "--dtypes", "float32", "--paths", "broken"]
    assert main(["layer", *arguments, *FAST, "--no-step"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "differs from the float64" in said


def test_reading_the_arguments_does_not_import_torch():
    code = (
        "import sys; from routerlab.bench.command import main; "
        "main([]); main(['layer', '--help']); main(['layer', '--nothing']); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
