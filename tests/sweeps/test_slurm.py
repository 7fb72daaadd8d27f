"""Sweeps on a real SLURM of two nodes, both of them this machine."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from routerlab.core.config import ConfigError, available, compose
from routerlab.sweeps.jobs import Job
from routerlab.sweeps.slurm import Slurm
from tests.helpers.slurm import ROOT, cluster, queue, slurm, tell
from tests.helpers.sweeps import Script, wait_for, without_timing

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

PROGRAM = [sys.executable, "-m", "routerlab.cli.main"]
ONE_CORE = ("resources.cpus_per_task=1", "resources.memory_gib=1", "resources.minutes=10")
# Saved by nothing but a signal and the end; long enough to be caught in the middle.
LONG = (
    "trainer.max_steps=30",
    "trainer.val_check_interval=15",
    "callback.checkpoint.every_n_steps=1000",
)


@pytest.fixture(scope="module", autouse=True)
def folder() -> Iterator[Path]:
    with cluster() as path:
        yield path


def launcher(folder: Path, *words: str) -> Slurm:
    return Slurm(folder, compose("launcher=slurm", *ONE_CORE, *words))


def script(folder: Path, name: str, code: str = "done(2.0)") -> Script:
    return Script(name, folder / name, (), code=code)


def drained(slurm: Slurm, count: int, seconds: float = 60.0) -> list[Job]:
    """The jobs that have ended, once there are ``count`` of them."""
    ended: list[Job] = []
    wait_for(lambda: ended.extend(slurm.poll()) or len(ended) >= count, seconds)
    return ended


def steps(run: Path) -> int:
    """How many steps a run has logged."""
    path = run / "metrics.csv"
    return len(without_timing(path)) if path.is_file() else 0


def job_of(run: Path) -> str:
    """The id of the SLURM job of a run."""
    return json.loads((run.parent / "slurm" / "jobs.json").read_text())[run.name]


def test_a_sweep_is_signalled_requeued_and_cancelled(
    train: Callable[..., Path], tiny_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = [w for w in tiny_words(*LONG, logger="logger=[wandb]") if "output_dir" not in w]
    # Three runs with one curve: they differ in their last validation alone.
    command = [*PROGRAM, "train", "-m", *words, "data.final_val_windows=6,7,8", "group=night"]
    command += [f"paths.output_dir={tmp_path}", "launcher=slurm", *ONE_CORE]
    watching = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT
    )
    sweep = tmp_path / "sweeps" / "night"
    left = {6: ("scancel", "--signal=USR2"), 7: ("scontrol", "requeue"), 8: ("scancel",)}

    def meddled() -> bool:
        assert watching.poll() is None, watching.communicate()[0]
        for number in list(left):
            for run in sweep.glob(f"final_val_windows-{number}_*"):
                if steps(run) >= 3:
                    slurm(*left.pop(number), job_of(run))
        return not left

    wait_for(meddled)
    signalled, requeued, cancelled = runs = sorted(sweep.glob("final_val_windows-*"))
    said, _ = watching.communicate(timeout=200)
    assert watching.returncode == 1
    assert "2 done, 1 failed" in said
    assert f"SLURM: job {job_of(cancelled)} cancelled" in said
    log = (signalled / "job.log").read_text()
    assert "stopped by SIGUSR2" in log
    assert f"SLURM queued job {job_of(signalled)} again" in log
    assert log.count("--- ") == (requeued / "job.log").read_text().count("--- ") == 2  # attempts

    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 of 3 runs are done already" in again.stdout
    whole = without_timing(train(*LONG, "name=whole") / "metrics.csv")
    for run in runs:
        assert without_timing(run / "metrics.csv") == whole
        pieces = list((run / "wandb").glob("offline-run-*"))
        assert len(pieces) == 2
        assert len({path.name.rsplit("-", 1)[1] for path in pieces}) == 1  # one run of W&B


def test_the_batch_script_trains_on_two_nodes_and_goes_on(
    train: Callable[..., Path], tiny_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "it's"
    small = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    words = [*tiny_words("objective.micro_batches=2"), "trainer.accelerator=cpu"]
    with contextlib.chdir(tmp_path), pytest.MonkeyPatch.context() as environment:
        environment.setenv("RUN_DIR", str(run))
        environment.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        place = slurm("sbatch", "--parsable", *small, str(ROOT / "slurm" / "train.sbatch"), *words)
    wait_for(lambda: steps(run) >= 1)
    slurm("scancel", "--signal=USR1", place)
    wait_for(lambda: place not in queue(), 200)
    log = (run / "job.log").read_text()
    assert "stopped by SIGUSR1" in log
    assert log.count("GLOBAL_RANK: 1, MEMBER: 2/2") == 2  # attempts
    assert json.loads((run / "status.json").read_text())["state"] == "done", log
    one = without_timing(train("objective.micro_batches=2", "name=one") / "metrics.csv")
    both = without_timing(run / "metrics.csv")
    assert [row["step"] for row in both] == [row["step"] for row in one]
    for key in ("train/loss", "val/loss"):
        found = [[float(row[key] or 0) for row in rows] for rows in (one, both)]
        assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert (tmp_path / f"routerlab-{place}.log").read_text().count(f"{run}/job.log") == 2


def test_the_processes_of_a_job_run_one_command(tmp_path: Path) -> None:
    two = ("resources.nodes=2", "resources.tasks_per_node=2", "trainer.strategy=ddp")
    code = "(path / os.environ['SLURM_PROCID']).write_text(str(sys.argv)); done(2.0)"
    job = script(tmp_path, "job", code)
    there = launcher(tmp_path, *two)
    there.submit([job])
    drained(there, 1)
    said = [(job.path / str(rank)).read_text() for rank in range(4)]
    assert len(set(said)) == 1
    (command,) = (tmp_path / "slurm").glob("*_command.json")  # decided once, for all
    assert json.loads(command.read_text())[:-1] == job.command()[:-1]


def test_a_second_call_adopts_what_is_in_the_queue(tmp_path: Path) -> None:
    wait = "(path / 'began').touch()\nwhile not (path / 'go').exists(): time.sleep(0.1)\ndone(2.0)"
    jobs = [script(tmp_path, name, wait) for name in ("a", "b")]
    first = launcher(tmp_path, "launcher.at_once=1")
    first.submit(jobs)
    wait_for(lambda: first.poll() or [job.title for job in first.running()] == ["a"])
    known = (tmp_path / "slurm" / "jobs.json").read_text()
    (array,) = {place.split("_")[0] for place in json.loads(known).values()}
    said = first.stop()
    assert "2 jobs stay in SLURM's queue" in said
    assert f"scancel {array}" in said

    second = launcher(tmp_path)
    second.submit([*jobs, script(tmp_path, "c")])
    assert drained(second, 1)[0].title == "c"
    known, more = json.loads(known), json.loads((tmp_path / "slurm" / "jobs.json").read_text())
    assert more["c"].split("_")[0] != array
    assert {name: more[name] for name in known} == known  # not submitted again
    assert not (tmp_path / "b" / "began").exists()  # one at a time
    for job in jobs:
        wait_for((job.path / "began").exists)
        (job.path / "go").touch()
    assert [job.title for job in drained(second, 2)] == ["a", "b"]
    assert [job.state() for job in jobs] == ["done", "done"]
    assert second.stop() == "nothing is left in SLURM's queue"


def test_the_job_of_another_cluster_is_not_taken_for_ours(tmp_path: Path) -> None:
    other = slurm("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 100")
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text(json.dumps({"a": other}))
    job = script(tmp_path, "a")
    there = launcher(tmp_path)
    there.submit([job])
    assert job_of(job.path) != other
    assert drained(there, 1) == [job]
    assert job.state() == "done"
    slurm("scancel", other)


def test_a_sweep_may_itself_be_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")  # srun refuses it beside memory of a node
    job = script(tmp_path, "a")
    there = launcher(tmp_path)
    there.submit([job])
    assert drained(there, 1) == [job]
    assert job.state() == "done", job.log.read_text()
    assert os.environ["SLURM_MEM_PER_CPU"] == "100"


def test_what_ends_a_job_is_told(tmp_path: Path) -> None:
    jobs = [
        script(tmp_path, "error", "sys.exit('error: router=hsah: no such config')"),
        script(tmp_path, "killed", "os.kill(os.getpid(), signal.SIGKILL)"),
        script(tmp_path, "waiting", "time.sleep(100)"),
        script(tmp_path, "done"),
    ]
    there = launcher(tmp_path)
    there.submit(jobs)
    ended = []
    wait_for(lambda: ended.extend(there.poll()) or jobs[2] in there.running())
    slurm("scancel", job_of(jobs[2].path))
    wait_for(lambda: ended.extend(there.poll()) or len(ended) == 4)
    assert jobs[0].error() == "router=hsah: no such config"
    assert "failed (Killed)" in jobs[1].error()
    assert jobs[2].error() == f"SLURM: job {job_of(jobs[2].path)} cancelled"
    assert jobs[3].state() == "done"
    assert "SLURM: job" not in jobs[3].log.read_text()


def test_a_job_that_never_came_to_its_command_is_told(tmp_path: Path) -> None:
    job = script(tmp_path, "blocked")
    job.path.write_text("a file where its directory should be")
    there = launcher(tmp_path)
    there.submit([job])
    assert drained(there, 1) == [job]


def test_the_words_of_slurm_for_a_wrong_partition(
    tmp_path: Path, tiny_words: Callable[..., list[str]]
) -> None:
    words = [w for w in tiny_words() if "output_dir" not in w]
    words += [f"paths.output_dir={tmp_path}", "launcher=slurm", "resources.partition=gold"]
    done = subprocess.run([*PROGRAM, "train", *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "error: sbatch refused the jobs: invalid partition specified: gold" in done.stderr
    assert "partition=gold" in done.stderr
    assert "Traceback" not in done.stderr
    there = launcher(tmp_path, "resources.cpus_per_task=65")
    with pytest.raises(ConfigError, match=r"configuration is not available"):
        there.submit([script(tmp_path, "a")])
    assert there.stop() == "nothing is left in SLURM's queue"


def test_a_job_that_waits_for_what_will_not_come_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = launcher(tmp_path, "resources.nodes=3", "trainer.strategy=ddp")
    there.submit([script(tmp_path, "a")])
    place = job_of(tmp_path / "a")
    said = []
    wait_for(lambda: there.poll() or said.append(capsys.readouterr().out) or any(said))
    assert "SLURM: 1 jobs wait: PartitionConfig" in "".join(said)
    slurm("scancel", place)
    assert len(drained(there, 1)) == 1


@pytest.mark.parametrize("name", available("resources"))
def test_every_resources_file_is_accepted(name: str, tmp_path: Path) -> None:
    cfg = compose("launcher=slurm", f"resources={name}", "resources.memory_gib=1")
    text = Slurm(tmp_path, cfg).script([script(tmp_path, "a"), script(tmp_path, "b")])
    assert "#SBATCH --array=0-1%2" in text
    assert "#SBATCH --requeue" in text
    path = tmp_path / "job.sh"
    path.write_text(text)
    done = subprocess.run(["sbatch", "--test-only", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cluster_that_does_not_answer_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = launcher(tmp_path)
    there.submit([script(tmp_path, "a", "time.sleep(100)")])
    empty = tmp_path / "slurm.conf"
    empty.write_text("")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("SLURM_CONF", str(empty))
        time.sleep(2.1)
        assert there.poll() == []
        with pytest.raises(ConfigError, match="SLURM does not answer: "):
            launcher(tmp_path).submit([script(tmp_path, "b")])
    slurm("scancel", job_of(tmp_path / "a"))
    assert len(drained(there, 1)) == 1


def test_the_cluster_says_how_it_is(folder: Path) -> None:
    assert "up (" in tell("status", str(folder))
    assert tell("up", str(folder)).startswith("export SLURM_CONF=")  # nothing happens


@pytest.mark.slow
def test_the_signal_of_a_real_time_limit(
    tiny_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    """SLURM sends it about a minute after the start of a job of two minutes."""
    words = tiny_words("trainer.max_steps=1000000", "trainer.val_check_interval=500")
    words += ["callback.checkpoint.every_n_steps=100000", "objective.log_every=50"]
    more = ["launcher=slurm", *ONE_CORE, "resources.minutes=2", "resources.signal_seconds=50"]
    run, whole = tmp_path / "limited" / "run", tmp_path / "whole"
    command = [*PROGRAM, "train", *words, f"run_dir={whole}"]
    beside = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    there = Slurm(run.parent, compose(*words, *more))
    there.submit([Job("limited", run, (*words, *more))])

    def log() -> str:
        return (run / "job.log").read_text() if (run / "job.log").is_file() else ""

    began = time.monotonic()
    wait_for(lambda: "queued job" in log(), 200)
    print(f"signalled and saved after {time.monotonic() - began:.0f} s")
    saved = steps(run)
    wait_for(lambda: min(steps(run), steps(whole)) >= saved + 20, 200)
    slurm("scancel", job_of(run))
    beside.terminate()
    beside.wait(60)
    drained(there, 1)
    assert "stopped by SIGUSR2" in log()
    here, reference = (without_timing(path / "metrics.csv") for path in (run, whole))
    common = min(len(here), len(reference))
    assert common > saved
    assert here[:common] == reference[:common]
