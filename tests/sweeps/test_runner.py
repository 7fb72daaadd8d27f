"""The loop that trains the jobs of a sweep, and what it shows."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from routerlab.core.config import ConfigError
from routerlab.sweeps import display
from routerlab.sweeps.display import Tally, closing, duration, progress
from routerlab.sweeps.jobs import Job
from routerlab.sweeps.local import Local
from routerlab.sweeps.outcome import Outcome, failed, run_seconds
from routerlab.sweeps.runner import held, run
from routerlab.sweeps.search import Listed
from tests.helpers.sweeps import Script, finished, wait_for

ROOT = Path(__file__).parents[2]


def job(folder: Path, name: str, code: str = "done(2.0)", after: tuple[Path, ...] = ()) -> Script:
    return Script(name, folder / name, (), after, code)


def train(folder: Path, *jobs: Job, workers: int = 2) -> int:
    return run(Listed(jobs), Local(folder, workers), folder, f"routerlab compare {folder}")


# -- what becomes of jobs -------------------------------------------------------------------------


def test_one_failure_stops_no_other_and_is_shown_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = "write('failed', error='ValueError: router.top_k=99: too many\\nmore'); sys.exit(2)"
    jobs = [job(tmp_path, "wrong", wrong), *(job(tmp_path, str(n)) for n in range(3))]
    assert train(tmp_path, *jobs) == 1
    said = capsys.readouterr().out
    assert "0 of 4 runs are done already, 4 to go" in said
    assert re.search(r"\[\d/4\] wrong: FAILED, ValueError: router.top_k=99: too many \(", said)
    assert f"log: {jobs[0].log}" in said
    assert said.count("2.000 bits per byte") == 3
    table = said[said.index("3 done, 1 failed") :]
    assert table.index("│ 0 ") < table.index("│ wrong ")  # the failed ones last
    assert "\nwrong: ValueError: router.top_k=99: too many\n" in table
    assert f"next: routerlab compare {tmp_path}\n" in said
    assert "wandb" not in said


def test_the_best_is_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, bits in (("b", 2.5), ("a", 3.5), ("c", 1.5)):
        finished(tmp_path / name, bits)
    (tmp_path / "a/wandb/offline-run-1").mkdir(parents=True)
    assert train(tmp_path, *(job(tmp_path, name, "never") for name in "abc")) == 0
    said = capsys.readouterr().out
    assert "3 of 3 runs are done already, 0 to go" in said
    assert re.findall(r"│ (\w) +│ done", said) == ["c", "b", "a"]
    assert f"wandb sync {tmp_path}/*/wandb/offline-run-*\n" in said


def test_what_is_done_is_left_alone_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    finished(tmp_path / "done", 2.0)
    again = "(path / 'config.yaml').exists()"
    code = f"done(1.0) if {again} else write('failed', error='the first time')"
    jobs = [job(tmp_path, "done", "done(9.0)"), job(tmp_path, "failing", code)]
    assert train(tmp_path, *jobs) == 1
    assert train(tmp_path, *jobs) == 0
    assert not jobs[0].log.exists()
    assert jobs[1].log.read_text().count("exit code") == 2


def test_a_killed_job_does_not_speak_of_an_older_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = job(tmp_path, "one", "os.kill(os.getpid(), signal.SIGKILL)")
    one.path.mkdir()
    (one.path / "config.yaml").write_text("")
    (one.path / "status.json").write_text('{"state": "failed", "error": "of yesterday"}')
    assert train(tmp_path, one) == 1
    assert "of yesterday" not in (said := capsys.readouterr().out)
    assert "one: FAILED, killed (signal 9); the same command goes on" in said


def test_a_job_waits_for_the_runs_that_it_builds_on(tmp_path: Path) -> None:
    first = job(tmp_path, "first", "time.sleep(0.3); done(1.0)")
    # Written only if its source was done when it started.
    code = "ready = (path.parent / 'first/summary.json').exists(); ready and done(2.0)"
    then = job(tmp_path, "then", code, (first.path,))
    assert train(tmp_path, then, first) == 0
    assert then.state() == "done"


def test_a_job_is_not_started_on_a_failed_or_missing_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = job(tmp_path, "first", "write('failed', error='broken')")
    jobs = [first, job(tmp_path, "then", after=(first.path,))]
    jobs.append(job(tmp_path, "alone", after=(tmp_path / "nowhere",)))
    assert train(tmp_path, *jobs) == 1
    said = capsys.readouterr().out
    assert f"then: FAILED, the run that it builds on failed: {first.path}" in said
    assert "alone: FAILED, the run that it builds on was never trained" in said
    assert not jobs[1].log.exists()


def test_a_full_disk_is_named_even_if_the_run_could_not_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job(tmp_path, "one")
    monkeypatch.setattr("routerlab.sweeps.outcome._room", lambda path: 4096)
    assert failed(one, None).error == "it printed nothing (only 0.00 MiB are left on its disk)"


# -- other processes ------------------------------------------------------------------------------


def elsewhere(path: Path, code: str) -> subprocess.Popen[bytes]:
    """Another process that trains the run at ``path``: it holds the lock and runs ``code``."""
    program = (
        "import json, sys, time; from pathlib import Path; from filelock import FileLock\n"
        "from tests.helpers.sweeps import _PRELUDE; path = sys.argv[1]; exec(_PRELUDE)\n"
        "lock = FileLock(path / '.lock'); lock.acquire(); write('running')\n"
        f"time.sleep(0.7); {code}"
    )
    path.mkdir()
    process = subprocess.Popen([sys.executable, "-c", program, path], cwd=ROOT)
    wait_for(lambda: (path / "status.json").is_file(), 20)
    return process


@pytest.mark.parametrize(("code", "attempts"), [("done(3.0)", 0), ("sys.exit()", 1)])
def test_a_run_of_another_process_is_waited_for_and_gone_on_with(
    tmp_path: Path, code: str, attempts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    other = elsewhere(tmp_path / "one", code)
    one = job(tmp_path, "one", "done(3.0)")
    assert one.state() == "running"
    assert train(tmp_path, one) == 0
    other.wait(10)
    found = one.log.read_text().count("exit code 0") if one.log.exists() else 0
    assert found == attempts
    assert "one: 3.000 bits per byte" in capsys.readouterr().out


def test_a_second_sweep_on_a_folder_refuses_at_once(tmp_path: Path) -> None:
    with held(tmp_path):
        start = time.monotonic()
        with pytest.raises(ConfigError, match=f"{tmp_path}.*another process runs a sweep there"):
            train(tmp_path, job(tmp_path, "one"))
        assert time.monotonic() - start < 1
    assert not (tmp_path / "one").exists()
    assert train(tmp_path, job(tmp_path, "one")) == 0  # the lock went with the first sweep


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: .*Not a directory"):
        train(tmp_path / "file" / "sweep", job(tmp_path, "one"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_jobs_and_the_same_call_goes_on(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: (write('preempted'), sys.exit(143)))\n"
        "again = (path / 'config.yaml').exists(); write('running')\n"
        "done(2.0) if again else time.sleep(60)"
    )
    jobs = [job(tmp_path, "one", code), job(tmp_path, "two")]
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    before = signal.getsignal(number)
    assert train(tmp_path, *jobs, workers=1) == 128 + number
    assert signal.getsignal(number) == before
    said = capsys.readouterr().out
    assert "stopped; 1 of 1 running jobs have saved" in said
    assert "the same command goes on with the 2 that are not done" in said
    assert [j.state() for j in jobs] == ["cut", "new"]
    assert train(tmp_path, *jobs) == 0


class Broken(Listed):
    """Fails as soon as a job has ended."""

    def tell(self, job: Job) -> None:
        raise ConfigError("metric 'x': no such number")


def test_an_error_of_the_search_leaves_no_process_behind(tmp_path: Path) -> None:
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); write('running'); time.sleep(60)"
    )
    source = Broken([job(tmp_path, "quick"), job(tmp_path, "slow", code)])
    launcher = Local(tmp_path, 2)
    with pytest.raises(ConfigError, match="no such number"):
        run(source, launcher, tmp_path, "")
    assert launcher.running() == []


class OneByOne(Listed):
    """A search that wants each result before it asks for the next job."""

    def __init__(self, jobs: list[Script]) -> None:
        super().__init__(jobs)
        self.left, self.told = list(jobs), []

    def ask(self) -> list[Job]:
        started = self.total - len(self.left)
        return [self.left.pop(0)] if self.left and len(self.told) == started else []

    def tell(self, job: Job) -> None:
        self.told.append((job.title, job.state()))

    def done(self) -> bool:
        return not self.left


def test_a_search_gets_each_result_before_it_chooses_the_next(tmp_path: Path) -> None:
    finished(tmp_path / "b", 2.0)
    source = OneByOne([job(tmp_path, name) for name in "abc"])
    assert run(source, Local(tmp_path, 2), tmp_path, "") == 0
    assert source.told == [("a", "done"), ("b", "done"), ("c", "done")]


# -- what is shown --------------------------------------------------------------------------------


def test_progress_is_the_last_step_that_a_run_printed(tmp_path: Path) -> None:
    one = job(tmp_path, "one")
    assert progress(one) == (0, 0, "starting")
    one.path.mkdir()
    lines = [f"step {n}/3000  loss {n}.5  9 s left" for n in range(3000)]
    one.log.write_text("\n".join([*lines, "step 2999  validation 2.1 bits per byte", "half a li"]))
    assert progress(one) == (2999, 3000, "loss 2999.5  9 s left")


def test_time_left_by_hand(tmp_path: Path) -> None:
    now = time.monotonic()
    two = {tmp_path / n: (job(tmp_path, n), now - 4) for n in "ab"}
    tally = Tally(total=7, done=1, running=two, seconds=[10.0])
    # two run, 6 s left of each; four wait, 10 s each: (12 + 40) / 2
    assert tally.left() == pytest.approx(26, abs=0.1)
    assert tally.text() == "1 done, 2 running, 4 waiting; about 26 s left"
    tally.seconds.clear()
    assert tally.left() is None  # nothing to go by
    (tmp_path / "a").mkdir()
    (tmp_path / "a/job.log").write_text("step 1/5  loss 2.0\n")  # 4 s for a fifth
    assert tally.left() == pytest.approx((16 + 16 + 4 * 20) / 2, abs=0.5)


def test_two_hundred_jobs_do_not_flood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [job(tmp_path, f"job-{n:03}") for n in range(200)]
    done = [Outcome(j, True, 2 + n / 100, "bits per byte") for n, j in enumerate(jobs[:120])]
    broken = [Outcome(j, False, error="the same") for j in jobs[120:]]
    closing([*broken, *done], tmp_path, "", Console(width=120))
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 110
    assert "job-000" in said  # the best
    assert "job-119" not in said
    assert "and 110 more that are done" in said
    assert "and 40 more that are failed" in said
    shown = display.Display()
    shown.started(jobs, Tally(200))
    assert capsys.readouterr().out == "200 jobs started\n"


def test_accuracies_are_ranked_from_the_top(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"low": 0.25, "high": 0.75}
    found = [Outcome(job(tmp_path, k), True, v, "accuracy", True) for k, v in scores.items()]
    closing(found, tmp_path, "", Console(width=100))
    said = capsys.readouterr().out
    assert said.index("high") < said.index("low")


class Screen(io.StringIO):
    """What a terminal would be sent."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_table_of_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    terminal = Console(file=screen, force_terminal=True, width=100, height=20)
    monkeypatch.setattr(display, "Console", lambda: terminal)
    monkeypatch.setattr(display, "_REFRESH", 0.1)
    code = "print('step 3/9  loss 2.5', flush=True); write('running'); time.sleep(0.8); done(2.0)"
    jobs = [job(tmp_path, "long", code), job(tmp_path, "wrong", "sys.exit('error: no')")]
    assert train(tmp_path, *jobs) == 1
    said = screen.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    assert re.search(r"long +0?\.?\d s +3/9 +loss 2.5", plain)
    assert "1 running" in plain
    assert "wrong: FAILED, no" in plain
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1  # the cursor is back


def test_a_summary_line_comes_now_and_then_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "_SUMMARY", 0.3)
    assert train(tmp_path, job(tmp_path, "one", "time.sleep(0.8); done(2.0)")) == 0
    assert 1 <= capsys.readouterr().out.count("0 done, 1 running, 0 waiting") <= 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.14, "0.1 s"), (42, "42 s"), (180, "3 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_of_a_run_is_from_its_config_to_its_end(tmp_path: Path) -> None:
    path = finished(tmp_path / "one", 2.0)
    assert run_seconds(path) is None  # when it began is not known
    (path / "environment.json").write_text("{}")
    os.utime(path / "environment.json", (1_000_000_000, 1_000_000_000))
    at = '{"state": "done", "at": "2001-09-09T01:47:40+00:00"}'  # 60 s later
    (path / "status.json").write_text(at)
    assert run_seconds(path) == 60
    os.utime(path / "environment.json", (1_000_000_050, 1_000_000_050))
    assert run_seconds(path) == 30  # it went on after a break: at least its training steps


def test_the_lock_of_a_sweep_goes_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]);"
        "lock.acquire(); print(1, flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, tmp_path / ".lock"]
    other = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(ConfigError, match="another process"), held(tmp_path):
        pass
    other.kill()
    other.wait()
    with held(tmp_path):
        pass


def test_a_corrupt_status_is_that_of_a_run_that_was_cut(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "status.json").write_text('{"state": "do')
    assert Job("a", tmp_path, ()).state() == "cut"
    (tmp_path / "status.json").write_text('{"state": "done"}')
    assert Job("a", tmp_path, ()).state() == "done"
