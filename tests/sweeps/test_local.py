"""Jobs as processes of this machine."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from routerlab.core.config import ConfigError
from routerlab.sweeps import local
from routerlab.sweeps.jobs import Job
from routerlab.sweeps.local import Local, from_config, usable_cores, visible_gpus
from tests.helpers.sweeps import Script, alive, wait_for

ROOT = Path(__file__).parents[2]
SLEEP = "write('running'); time.sleep(60)"


def job(folder: Path, name: str, code: str = "done(2.0)") -> Script:
    return Script(name, folder / name, (), code=code)


def drain(launcher: Local, count: int) -> list[Job]:
    """The next ``count`` jobs that end."""
    ended: list[Job] = []

    def enough() -> bool:
        ended.extend(launcher.poll())
        return len(ended) >= count

    wait_for(enough, 20)
    return ended


def config(workers: object = None, accelerator: str = "cpu", devices: object = 1) -> object:
    return OmegaConf.create(
        {
            "launcher": {"workers": workers},
            "trainer": {"accelerator": accelerator, "devices": devices},
        }
    )


# -- processes ------------------------------------------------------------------------------------


def test_no_more_jobs_than_workers_run_at_once_in_their_order(tmp_path: Path) -> None:
    jobs = [job(tmp_path, str(n), "time.sleep(0.2); done(2.0)") for n in range(4)]
    launcher = Local(tmp_path, workers=2)
    launcher.submit(jobs)
    assert launcher.running() == jobs[:2]
    assert sorted(j.title for j in drain(launcher, 4)) == ["0", "1", "2", "3"]
    assert launcher.running() == []
    assert all(j.state() == "done" for j in jobs)


def test_a_log_has_every_attempt_and_how_it_ended(tmp_path: Path) -> None:
    one = job(tmp_path, "one", "print('hello', flush=True); sys.exit('error: no such thing')")
    launcher = Local(tmp_path, workers=1)
    for _ in range(2):
        launcher.submit([one])
        drain(launcher, 1)
    text = one.log.read_text()
    assert text.count("hello\nerror: no such thing\n--- after 0 s: exit code 1\n") == 2
    assert text.count(f"({launcher.threads} threads)") == 2
    assert one.error() == "no such thing"


def test_a_killed_process_is_told_from_one_that_failed(tmp_path: Path) -> None:
    one = job(tmp_path, "one", "write('running'); os.kill(os.getpid(), signal.SIGKILL)")
    launcher = Local(tmp_path, workers=1)
    launcher.submit([one])
    drain(launcher, 1)
    assert one.state() == "cut"
    assert one.error() == "killed (signal 9); the same command goes on"


def test_a_job_that_cannot_be_started_ends_and_others_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong, right = job(tmp_path / "file", "wrong"), job(tmp_path, "right")
    launcher = Local(tmp_path, workers=1)
    launcher.submit([wrong, right])
    assert {j.title for j in drain(launcher, 2)} == {"wrong", "right"}
    assert right.state() == "done"


def test_a_process_sees_no_terminal_and_none_of_our_ctrl_c(tmp_path: Path) -> None:
    code = "print(os.getpgid(0) == os.getpid(), sys.stdin.read() == '', flush=True); done(1.0)"
    one = job(tmp_path, "one", code)
    launcher = Local(tmp_path, workers=1)
    launcher.submit([one])
    drain(launcher, 1)
    assert "True True" in one.log.read_text()


# -- stopping -------------------------------------------------------------------------------------

SAVES = (
    "signal.signal(signal.SIGTERM, lambda *_: (write('preempted'), sys.exit(143)));"
    "write('running'); time.sleep(60)"
)
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); write('running'); time.sleep(60)"


def started(launcher: Local, jobs: list[Script]) -> None:
    launcher.submit(jobs)
    running = launcher.running()
    wait_for(lambda: all((j.path / "status.json").is_file() for j in running), 20)


def test_stopped_processes_save_and_those_that_wait_are_not_started(tmp_path: Path) -> None:
    jobs = [job(tmp_path, name, SAVES) for name in "abc"]
    launcher = Local(tmp_path, workers=2)
    started(launcher, jobs)
    assert launcher.stop() == "stopped; 2 of 2 running jobs have saved"
    assert [j.state() for j in jobs] == ["cut", "cut", "new"]
    assert jobs[0].error() == "stopped (signal 15); the same command goes on"
    assert launcher.poll() == launcher.running() == []


def test_one_that_does_not_stop_is_killed_with_its_own_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_PATIENCE", 0.5)
    helper = "import subprocess; child = subprocess.Popen(['sleep', '60']);"
    keep = "(path / 'child').write_text(str(child.pid));"
    one = job(tmp_path, "one", helper + keep + STUBBORN)
    launcher = Local(tmp_path, workers=1)
    started(launcher, [one])
    assert launcher.stop().endswith("0 of 1 running jobs have saved, the others were killed")
    wait_for(lambda: not alive(int((one.path / "child").read_text())), 10)


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    one = job(tmp_path, "one", STUBBORN)
    launcher = Local(tmp_path, workers=1)
    started(launcher, [one])
    # as the runner does; a shell's background job ignores Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        assert "0 of 1 running jobs have saved" in launcher.stop()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10
    assert one.state() == "cut"


def test_a_place_is_occupied_while_its_process_lives_whoever_started_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.helpers.sweeps import Script\n"
        "from routerlab.sweeps.local import Local\nimport os, signal\n"
        "folder = Path(sys.argv[1])\n"
        f"job = Script('old', folder / 'old', (), code={SLEEP!r})\n"
        "launcher = Local(folder, workers=1); launcher.submit([job])\n"
        "print(launcher._children[0][1].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL
    orphan = int(killed.stdout)
    assert alive(orphan)
    launcher, new = Local(tmp_path, workers=1), job(tmp_path, "new")
    launcher.submit([new])
    assert launcher.poll() == launcher.running() == []
    os.kill(orphan, signal.SIGKILL)
    assert drain(launcher, 1) == [new]


def test_what_an_older_process_has_done_by_now_is_not_started(tmp_path: Path) -> None:
    one = job(tmp_path, "one")
    old, launcher = Local(tmp_path, workers=1), Local(tmp_path, workers=1)
    old.submit([job(tmp_path, "one", "time.sleep(0.5); done(3.0)")])
    assert one.state() == "new"  # its process has said nothing yet
    launcher.submit([one])
    assert drain(launcher, 1) == [one]
    assert one.state() == "done"
    assert one.log.read_text().count(" threads)") == 1


# -- shares of the machine ------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "devices", "threads"), [(1, 1, 8), (3, 1, 2), (2, 2, 2)])
def test_jobs_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, devices: int, threads: int
) -> None:
    monkeypatch.setattr(local, "usable_cores", lambda: 8)
    found = Local(tmp_path, workers, devices=devices).environment(0)
    assert found["OMP_NUM_THREADS"] == str(threads)
    assert "CUDA_VISIBLE_DEVICES" not in found or "CUDA_VISIBLE_DEVICES" in os.environ


def test_a_worker_in_a_job_of_slurm_is_not_that_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMY", "stays")
    found = Local(tmp_path, 1).environment(0)
    assert "SLURM_JOB_ID" not in found
    assert found["SLURMY"] == "stays"


def test_gpus_are_dealt_out(tmp_path: Path) -> None:
    def seen(launcher: Local) -> list[str]:
        places = range(launcher.workers)
        return [launcher.environment(place)["CUDA_VISIBLE_DEVICES"] for place in places]

    assert seen(Local(tmp_path, 4, gpus=list("0123"))) == ["0", "1", "2", "3"]
    assert seen(Local(tmp_path, 2, gpus=list("0123"), devices=2)) == ["0,1", "2,3"]
    assert seen(Local(tmp_path, 3, gpus=["5", "7"])) == ["5", "7", "5"]  # more jobs than GPUs


@pytest.fixture
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nvidia-smi finds three GPUs."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("said", "found"),
    [(None, ["0", "1", "2"]), ("2, 0", ["2", "0"]), ("", []), ("-1", []), ("MIG-a", ["MIG-a"])],
)
@pytest.mark.usefixtures("three_gpus")
def test_only_gpus_that_we_may_use_are_dealt_out(
    said: str | None, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if said is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    assert visible_gpus() == found


@pytest.mark.usefixtures("three_gpus")
def test_one_worker_a_gpu_or_as_many_as_a_job_takes(tmp_path: Path) -> None:
    def made(accelerator: str, devices: object) -> Local:
        return from_config(config(None, accelerator, devices), tmp_path, 100)  # pyright: ignore

    assert (made("auto", 1).workers, made("auto", 1).gpus) == (3, ["0", "1", "2"])
    assert made("gpu", 2).workers == 1
    assert made("auto", "auto").workers == 3
    assert made("auto", [0, 1]).workers == 1
    assert made("cpu", 1).gpus == []


def test_workers_are_limited_by_cores_memory_and_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "usable_cores", lambda: 16)
    monkeypatch.setattr(local, "usable_memory", lambda: 20 * 2**30)

    def workers(jobs: int, devices: int = 1, said: int | None = None) -> int:
        return from_config(config(said, devices=devices), tmp_path, jobs).workers  # pyright: ignore

    assert workers(100) == 10  # 2 GiB a run
    assert workers(3) == 3
    assert workers(100, devices=4) == 2
    assert workers(100, said=40) == 40  # who says a number knows better
    monkeypatch.setattr(local, "usable_memory", lambda: 0)  # not known
    assert workers(100) == 16
    monkeypatch.setattr(local, "usable_memory", lambda: 2**30)
    assert workers(100) == 1


@pytest.mark.parametrize("workers", [0, -2, "two", 1.5, True])
def test_workers_that_are_no_number_are_refused(tmp_path: Path, workers: object) -> None:
    with pytest.raises(ConfigError, match=f"launcher.workers={workers}: must be"):
        from_config(config(workers), tmp_path, 3)  # pyright: ignore


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    limits = {"cpu.max": ["100000", "100000"], "memory.max": ["1073741824"]}
    monkeypatch.setattr(local, "_control_group", lambda name: limits[name])
    assert usable_cores() == 1
    assert local.usable_memory() == 2**30
