"""Sweeps of real runs that are killed, stopped, or run out of room: the same command goes on, and
the numbers are those of an uninterrupted sweep.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.sweeps import alive, children, wait_for, without_timing

# Two jobs of two seconds each, beside what their imports take.
LENGTH = ("trainer.max_steps=240", "trainer.val_check_interval=120", "objective.log_every=5")
SEEDS = ("seed=0,1", "launcher.workers=2", *LENGTH, "callback.checkpoint.every_n_steps=20")
EXACT = re.compile(r"seed-(\d)")


class Sweep:
    """``routerlab train -m`` as processes of their own, on one folder."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.words = [*words, f"paths.output_dir={folder}", "group=proof"]
        self.folder = folder / "sweeps" / "proof"

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "routerlab.cli.main", "train", "-m", *self.words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def run(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        process = self.start()
        said, _ = process.communicate(timeout=200)
        return process.returncode, said

    def paths(self) -> dict[int, Path]:
        """The run of each seed."""
        found = self.folder.glob("*/config.yaml")
        return {int(EXACT.findall(path.parent.name)[0]): path.parent for path in found}

    def checkpoints(self, seed: int) -> list[Path]:
        path = self.paths().get(seed)
        return sorted(path.glob("checkpoints/step_*.ckpt")) if path else []

    def wait_until_saved(self, seed: int, times: int = 1) -> None:
        """Until a run is in the middle."""
        wait_for(lambda: len(self.checkpoints(seed)) >= times)
        assert not (self.paths()[seed] / "summary.json").is_file()

    def attempts(self, seed: int) -> list[str]:
        """The lines of its log that head an attempt."""
        lines = (self.paths()[seed] / "job.log").read_text().splitlines()
        return [line for line in lines if re.match(r"--- \d{4}-", line)]

    def rows(self) -> dict[int, list[dict[str, str]]]:
        return {seed: without_timing(p / "metrics.csv") for seed, p in self.paths().items()}


@pytest.fixture(scope="module")
def make(
    tiny_words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Sweep]:
    """A sweep of two seeds, in a folder of its own unless one is given."""

    def sweep(*more: str, folder: Path | None = None) -> Sweep:
        return Sweep(tiny_words(*SEEDS, *more), folder or tmp_path_factory.mktemp("sweep"))

    return sweep


@pytest.fixture(scope="module")
def whole(make: Callable[..., Sweep]) -> tuple[Sweep, int, str]:
    """An uninterrupted sweep; half of its jobs fail, which is none of the others' business."""
    sweep = make("router=token_choice,expert_choice")
    return sweep, *sweep.run()


def test_a_job_that_fails_stops_none_of_the_others(whole: tuple[Sweep, int, str]) -> None:
    _, code, said = whole
    assert code == 1
    assert "0 of 4 runs are done already, 4 to go" in said
    assert len(re.findall(r"router=token_choice seed=\d: \d\.\d{3} bits per byte", said)) == 2
    assert len(re.findall(r"router=expert_choice seed=\d: FAILED, .*leak the future", said)) == 2
    table = said[said.index("2 done, 2 failed") :]
    assert len(re.findall(r"router=expert_choice seed=\d: .*leak the future", table)) == 2


def same_numbers(sweep: Sweep, whole: tuple[Sweep, int, str]) -> bool:
    expected = {s: rows for s, rows in whole[0].rows().items() if len(rows) > 40}
    assert expected.keys() == {0, 1}
    return sweep.rows() == expected


def test_kill_9_of_a_job_and_of_the_sweep(
    make: Callable[..., Sweep], whole: tuple[Sweep, int, str]
) -> None:
    sweep = make("router=token_choice")
    first = sweep.start()
    sweep.wait_until_saved(seed=0)
    by_seed = {
        int(EXACT.findall(Path(f"/proc/{pid}/cmdline").read_text())[0]): pid
        for pid in children(first.pid)
    }
    os.kill(by_seed[0], signal.SIGKILL)
    assert first.stdout is not None
    told = next(line for line in first.stdout if "FAILED" in line)
    assert "seed=0: FAILED, killed (signal 9); the same command goes on" in told
    first.kill()
    first.wait()
    assert alive(by_seed[1])  # and goes on without the sweep

    second = sweep.start()
    assert second.stdout is not None
    assert re.match("[01] of 2 runs are done already", second.stdout.readline())
    third = sweep.start()  # a sweep too many
    said, _ = third.communicate(timeout=100)
    assert third.returncode == 2
    assert f"error: sweep folder '{sweep.folder}': another process runs a sweep there" in said
    said, _ = second.communicate(timeout=200)
    assert second.returncode == 0
    assert "2 done, 0 failed" in said
    assert len(sweep.attempts(1)) == 1  # it was waited for
    assert len(sweep.attempts(0)) == 2
    assert "resume=" in sweep.attempts(0)[1]
    assert same_numbers(sweep, whole)


def test_ctrl_c_and_a_truncated_checkpoint(
    make: Callable[..., Sweep], whole: tuple[Sweep, int, str]
) -> None:
    sweep = make("router=token_choice")
    process = sweep.start()
    sweep.wait_until_saved(seed=0, times=2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 130
    assert re.search("the same command goes on with the [12] that are not done", said)
    status = json.loads((sweep.paths()[0] / "status.json").read_text())
    assert status["state"] == "preempted"  # which is: saved
    older, newest = sweep.checkpoints(seed=0)
    newest.write_bytes(newest.read_bytes()[:1000])

    code, said = sweep.run()
    assert code == 0
    log = (sweep.paths()[0] / "job.log").read_text()
    assert f"{newest.name} is truncated; falling back to {older}" in log
    assert same_numbers(sweep, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk(
    make: Callable[..., Sweep], whole: tuple[Sweep, int, str], small_disk: Path
) -> None:
    sweep = make("router=token_choice", folder=small_disk)
    code, said = sweep.run()
    assert code == 1
    assert len(re.findall(r"seed=\d: FAILED, .*([Nn]o space left|MiB are left)", said)) == 2
    assert not list(sweep.folder.glob("*/checkpoints/*.tmp"))

    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    code, said = sweep.run()
    assert code == 0, said
    assert same_numbers(sweep, whole)
