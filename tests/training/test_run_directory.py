"""What a run leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from routerlab.core.config import ConfigError
from routerlab.training.run_directory import RunDirectory


def test_two_runs_of_one_second_have_two_directories(tmp_path: Path) -> None:
    runs = {RunDirectory.new(tmp_path, "exp", ["router.top_k=1"], None).path for _ in range(5)}
    assert len(runs) == 5
    assert all(path.parent == tmp_path / "exp" for path in runs)


def test_the_name_tells_the_overrides_and_stays_short(tmp_path: Path) -> None:
    words = ["experiment=quickstart", "router.top_k=1", "data.domains={a: /x/y}", "x=" + "y" * 300]
    name = RunDirectory.new(tmp_path, "exp", words, None).name
    assert "top_k-1" in name
    assert "=" not in name  # it would have to be quoted in resume=...
    assert "/" not in name
    assert "quickstart" not in name
    assert len(name) < 120


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    run = RunDirectory.new(tmp_path, "exp", [], str(tmp_path / "mine"))
    run.write_config(OmegaConf.create({"seed": 0}), [])
    with pytest.raises(ConfigError, match=r"already holds a run.*resume="):
        RunDirectory.new(tmp_path, "exp", [], str(tmp_path / "mine"))


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunDirectory.new(tmp_path / "file", "exp", [], None)
    with pytest.raises(ConfigError, match="cannot be written"):
        RunDirectory.new(tmp_path, "exp", [], "/proc/routerlab")


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        RunDirectory.existing(tmp_path)


def test_the_status_keeps_the_error(tmp_path: Path) -> None:
    run = RunDirectory.new(tmp_path, "exp", [], None)
    run.set_status("failed", ValueError("top_k=9: too many"))
    status = json.loads((run.path / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["error"] == "ValueError: top_k=9: too many"


def test_the_newest_readable_checkpoint_is_found(tmp_path: Path) -> None:
    import torch

    run = RunDirectory.new(tmp_path, "exp", [], None)
    assert run.newest_checkpoint() == (None, [])
    for step in (5, 10, 100):
        torch.save({"step": step}, run.path / "checkpoints" / f"step_{step:06d}.ckpt")
    newest = run.path / "checkpoints" / "step_000100.ckpt"
    assert run.newest_checkpoint() == (newest, [])
    newest.write_bytes(newest.read_bytes()[:-50])
    assert run.newest_checkpoint() == (newest.with_name("step_000010.ckpt"), [newest])


HOLD = """
import sys, time
from pathlib import Path
from routerlab.training.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).held():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    run = RunDirectory.new(tmp_path, "exp", [], None)
    assert not run.is_held()
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert run.is_held()
        with pytest.raises(ConfigError, match="another process is training this run"), run.held():
            pass
        holder.kill()
    assert not run.is_held()
    with run.held():
        assert run.path.is_dir()


def test_the_words_and_what_they_chose_are_kept(tmp_path: Path) -> None:
    run = RunDirectory.new(tmp_path, "exp", [], None)
    run.write_config(OmegaConf.create({"seed": 0}), ["router=hash"])
    assert run.overrides == ["router=hash"]
    assert OmegaConf.load(run.path / "choices.yaml").router == "hash"
