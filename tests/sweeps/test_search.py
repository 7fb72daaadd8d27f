"""Points that are drawn, at random or by Optuna's estimator."""

import math
import re
import sys
from pathlib import Path

import optuna
import pytest

from routerlab.core.config import ConfigError
from routerlab.sweeps.definition import Sweep, read
from routerlab.sweeps.jobs import Job
from routerlab.training.run_directory import RunDirectory

SPACE = (
    "optimizer.optimizer.lr=tag(log,interval(1e-4,1e-1))",
    "backbone.d_ff=int(interval(8,64))",
    "router.top_k=range(1,5)",
)


def values(job: Job) -> tuple[float, int, int]:
    """What the three keys of `SPACE` are in a job."""
    found = dict(word.split("=", 1) for word in job.words if "=" in word)
    lr, d_ff, top_k = (found[word.split("=")[0]] for word in SPACE)
    return float(lr), int(d_ff), int(top_k)


def bowl(job: Job) -> float:
    """Lowest, 0, at a learning rate of 0.003, 16 wide, with 2 experts a token."""
    lr, d_ff, top_k = values(job)
    return math.log10(lr / 0.003) ** 2 + math.log2(d_ff / 16) ** 2 + 0.3 * (top_k - 2) ** 2


def finish(job: Job, state: str = "done", **val: float) -> None:
    """Leaves the files of a run that has ended."""
    run = RunDirectory(job.path)
    job.path.mkdir(parents=True, exist_ok=True)
    (job.path / "config.yaml").touch()
    run.write_json("summary.json", {"val": {"items": 9, "note": "text", **val}})
    run.set_status(state)


def tpe(folder: Path, trials: int, *words: str, metric: str | None = None) -> Sweep:
    """A search by Optuna, two jobs at a time."""
    first = [f"paths.output_dir={folder}", "launcher.workers=2", *SPACE]
    return read([*first, *words], trials=trials, search="tpe", metric=metric)


def train(sweep: Sweep, most: int = 10_000) -> list[Job]:
    """Ends at most so many jobs, one after the other; returns them."""
    waiting, ended = sweep.source.ask(), []
    while waiting and len(ended) < most:
        job = waiting.pop(0)
        if job.state() != "done":
            finish(job, bits_per_byte=bowl(job), loss=0.0)
            ended.append(job)
        sweep.source.tell(job)
        waiting += sweep.source.ask()
    return ended


def test_a_random_search_tries_the_same_points_for_every_router_and_seed(tmp_path: Path) -> None:
    words = [f"paths.output_dir={tmp_path}", "router=token_choice,olmoe", "seed=0,1", *SPACE]
    sweep = read(words, trials=3)
    jobs = sweep.source.ask()
    assert (len(jobs), sweep.source.total) == (12, 12)
    assert [" ".join(re.findall(r"(?:router|seed)=\w+", job.title)) for job in jobs[:7]] == [
        "router=token_choice seed=0", "router=olmoe seed=0",
    ] * 3 + ["router=token_choice seed=1"]  # fmt: skip
    points = [values(job) for job in jobs]
    assert points[0::2] == points[1::2]
    assert points[:6] == points[6:]
    assert len(set(points)) == 3
    for lr, d_ff, top_k in points:
        assert 1e-4 <= lr <= 1e-1
        assert 8 <= d_ff <= 64
        assert 1 <= top_k <= 4


def test_more_trials_go_on_with_the_points_of_fewer(tmp_path: Path) -> None:
    words = [f"paths.output_dir={tmp_path}", *SPACE]
    three, five = (read(words, trials=n).source.preview() for n in (3, 5))
    assert five[:3] == three
    elsewhere = read([*words, "group=other"], trials=3).source.preview()
    assert not {values(job) for job in elsewhere} & {values(job) for job in three}


def test_points_that_repeat_are_one_job(tmp_path: Path) -> None:
    sweep = read([f"paths.output_dir={tmp_path}", "router.top_k=choice(1,2)"], trials=20)
    assert sweep.source.total == 2
    assert sweep.notes[0].startswith("18 jobs")


def test_tpe_finds_the_better_region(tmp_path: Path) -> None:
    sweep = tpe(tmp_path, 40)
    assert sweep.source.total == 40
    scores = [bowl(job) for job in train(sweep)]
    assert len(scores) == 40
    assert sweep.source.done()
    first, last = sorted(scores[:10]), sorted(scores[30:])
    assert last[5] < first[5] / 2  # medians
    assert min(scores[10:]) < first[0] / 2


def test_tpe_hands_out_as_many_as_keep_the_workers_busy(tmp_path: Path) -> None:
    source = tpe(tmp_path, 5, "seed=0,1,2").source
    first = source.ask()
    assert [job.title.split()[-1] for job in first] == ["seed=0", "seed=1", "seed=2"]
    assert len({values(job) for job in first}) == 1  # one trial, every seed
    for job in first[:2]:
        finish(job, bits_per_byte=1.0)
        source.tell(job)
    assert len(source.ask()) == 3  # one of the first trial is left, two are wanted
    assert not source.done()


def test_tpe_goes_on_from_its_journal(tmp_path: Path) -> None:
    before = tpe(tmp_path, 14)
    done = train(before, most=11)
    journal = before.folder / "search.journal"
    left = [job for job in tpe(tmp_path, 14).source.ask() if job.state() != "done"]
    assert left  # that were under way when the first was stopped
    with journal.open("a") as file:  # killed in the middle of a line, with Optuna's lock
        file.write('{"op_code": 4, "worker')
    Path(f"{journal}.lock").symlink_to(journal)
    again = tpe(tmp_path, 14)
    first = again.source.ask()
    assert [job for job in first if job.state() == "done"] == done  # told of, not run again
    assert [job for job in first if job.state() != "done"] == left
    assert not again.source.done()
    after = train(tpe(tmp_path, 14))
    assert after[: len(left)] == left
    assert len({job.path for job in [*done, *after]}) == 14
    finished = tpe(tmp_path, 14)
    assert train(finished) == []
    assert finished.source.done()
    assert len(train(tpe(tmp_path, 16))) == 2  # a longer search


def test_later_calls_draw_other_points(tmp_path: Path) -> None:
    points = [values(job) for _ in range(4) for job in train(tpe(tmp_path, 8), most=2)]
    assert len(set(points)) == len(points) == 8


def test_a_trial_that_was_not_drawn_to_the_end_is_drawn_again(tmp_path: Path) -> None:
    sweep = tpe(tmp_path, 3)
    train(sweep, most=1)
    journal = sweep.folder / "search.journal"
    lines = journal.read_text().splitlines(keepends=True)
    drawn = [n for n, line in enumerate(lines) if '"param_name"' in line]
    journal.write_text("".join(lines[: drawn[-1]]))  # without the last value of the last trial
    jobs = train(tpe(tmp_path, 3))
    assert len(jobs) == 2
    assert all(len(values(job)) == 3 for job in jobs)


def test_a_failed_seed_keeps_its_trial_open(tmp_path: Path) -> None:
    sweep = tpe(tmp_path, 2, "seed=0,1")
    first = sweep.source.ask()
    finish(first[0], bits_per_byte=1.0)
    finish(first[1], "failed")
    for job in first:
        sweep.source.tell(job)
    rest = train(sweep)
    assert len(rest) == 2
    assert not set(rest) & set(first)
    assert sweep.source.done()  # the others went on without it
    again = tpe(tmp_path, 2, "seed=0,1")
    assert set(again.source.ask()) == {*first, *rest}
    assert not again.source.done()
    finish(first[1], bits_per_byte=2.0)
    again.source.tell(first[1])
    assert again.source.done()
    trials = _trials(again.folder)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert trials[0].value == 1.5  # the mean over seeds


def test_accuracies_are_maximised_and_losses_minimised(tmp_path: Path) -> None:
    for number, (metric, sign) in enumerate(
        [(None, 1), ("val/loss", 1), ("by_task.sums/accuracy", -1)]
    ):
        sweep = tpe(tmp_path, 1, f"group=g{number}", metric=metric)
        [job] = sweep.source.ask()
        keys = {"bits_per_byte": 0.5, "accuracy": 0.5, "loss": 0.5}
        finish(job, **keys, by_task={"sums": {"accuracy": 0.5}})  # type: ignore[arg-type]
        sweep.source.tell(job)
        assert _trials(sweep.folder)[0].value == sign * 0.5


def test_an_unknown_metric_is_refused_with_those_there_are(tmp_path: Path) -> None:
    sweep = tpe(tmp_path, 3, metric="bits_per_bite")
    job = sweep.source.ask()[0]
    finish(job, bits_per_byte=1.0)
    with pytest.raises(ConfigError, match="did you mean 'bits_per_byte'"):
        sweep.source.tell(job)


def test_every_router_is_searched_alike(tmp_path: Path) -> None:
    sweep = tpe(tmp_path, 4, "router=token_choice,olmoe")
    preview = sweep.source.preview()
    assert not sweep.folder.exists()  # a preview writes nothing
    jobs = train(sweep)
    assert (len(jobs), sweep.source.total) == (8, 8)
    assert {job.path for job in jobs} == {job.path for job in preview}  # still at random
    points = {name: {values(j) for j in jobs if f"router={name}" in j.words}
              for name in ("token_choice", "olmoe")}  # fmt: skip
    assert points["token_choice"] == points["olmoe"]
    assert len(points["olmoe"]) == 4


def test_tpe_ends_where_only_few_points_are_possible(tmp_path: Path) -> None:
    words = [f"paths.output_dir={tmp_path}", "router.top_k=choice(1,2)"]
    sweep = read(words, trials=12, search="tpe")
    waiting, count = sweep.source.ask(), 0
    while waiting:
        job, count = waiting.pop(), count + 1
        finish(job, loss=1.0)
        sweep.source.tell(job)
        waiting += sweep.source.ask()
    assert (count, sweep.source.total, sweep.source.done()) == (2, 2, True)


def test_a_missing_optuna_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "routerlab.sweeps.tpe", raising=False)
    with pytest.raises(ConfigError, match=r"optuna is not installed: pip install 'routerlab\[sea"):
        tpe(tmp_path, 3)


def _trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    file = optuna.storages.journal.JournalFileBackend(str(folder / "search.journal"))
    storage = optuna.storages.JournalStorage(file)
    [study] = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=study, storage=storage).get_trials()
