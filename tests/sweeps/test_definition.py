"""Words of a sweep, and the jobs that they make."""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import routerlab as rl
from routerlab.core.config import ConfigError, compose, config_dir, describe, use_directory
from routerlab.core.identity import identity
from routerlab.objectives.rehearsal import rehearse
from routerlab.sweeps import grammar
from routerlab.sweeps.definition import read
from routerlab.sweeps.jobs import Job
from routerlab.training.assemble import build_objective

LR = "optimizer.optimizer.lr"
BOWL = f"{LR}=tag(log,interval(1e-4,1e-1))"


def jobs_of(folder: Path, *words: str, **options: Any) -> list[Job]:
    """The jobs of a sweep that writes into ``folder``."""
    return read([f"paths.output_dir={folder}", *words], **options).source.preview()


def test_lists_are_crossed_one_seed_after_the_other(tmp_path: Path) -> None:
    output = f"paths.output_dir={tmp_path}"
    sweep = read([output, "experiment=study", "seed=0,1", "router=hash,olmoe", "router.top_k=1,2"])
    jobs = sweep.source.ask()
    routers = [("hash", 1), ("hash", 2), ("olmoe", 1), ("olmoe", 2)]
    assert [job.title for job in jobs] == [
        f"router={router} top_k={k} seed={seed}" for seed in (0, 1) for router, k in routers
    ]
    assert jobs[1].words == (
        output, "experiment=study", "router=hash", "router.top_k=2", "seed=0", "group=study",
    )  # fmt: skip
    assert sweep.group == "study"
    assert sweep.folder == tmp_path / "sweeps" / "study"
    assert {job.path.parent for job in jobs} == {sweep.folder}
    assert jobs[1].path.name.startswith("router-hash_top_k-2_seed-0_")
    assert sweep.cfg.router._target_.endswith("HashRouter")
    assert (sweep.source.total, sweep.notes) == (8, ())
    assert sweep.source.done()
    assert sweep.source.ask() == []
    assert not sweep.folder.exists()  # reading writes nothing


def test_a_job_has_the_config_that_its_words_make(tmp_path: Path) -> None:
    words = ["loss=[load_balancing],[load_balancing,router_z]", "balancer=glob(*bias)",
             "loss.load_balancing.weight=0.01,0.1", "+extra={a: 1},{a: 2}",
             "backbone.num_experts=range(4,9,4)", "data.domains={prose: 'a b'}"]  # fmt: skip
    jobs = jobs_of(tmp_path, "data=files", *words)
    assert len({job.path for job in jobs}) == 16
    for job in jobs[::5]:
        cfg = compose(*job.words)
        assert job.path.name.endswith(f"_{identity(cfg)}")
        assert cfg.group == "train"
    [fewer, _] = jobs_of(tmp_path, "~loss.router_z", "seed=0,1")
    assert list(compose(*fewer.words).loss) == ["load_balancing"]


def test_a_process_reads_the_words_of_a_job_as_they_were_meant(tmp_path: Path) -> None:
    path = "a b=c,d/[e] 'f' \"g\": (h)"
    output = f"paths.output_dir={grammar.literal(str(tmp_path / 'x=y, z'))}"
    word = f"embedder={grammar.literal(path)},a\\,b\\=c \\ d"
    [job, escaped] = read([output, word]).source.preview()
    assert compose(*job.words).embedder == path
    assert compose(*escaped.words).embedder == "a,b=c  d"
    assert job.path.parent == tmp_path / "x=y, z" / "sweeps" / "train"
    command = [*job.command(), "--cfg", "job"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert any(line.startswith("embedder: ") and "(h)" in line for line in shown.splitlines())
    assert f"run_dir: {job.path}" in shown


@pytest.mark.parametrize(
    ("word", "titles"),
    [
        ("router=glob(s*,exclude=[so*,su*])",
         [f"router={n}" for n in ("s_base", "selective_sinkhorn", "sinkhorn", "st_moe", "switch")]),
        ("seed=range(3)", ["seed=0", "seed=1", "seed=2"]),
        (f"{LR}=choice(0.1,1e-3)", ["lr=0.1", "lr=0.001"]),
        ("backbone.d_ff=int(8.5,16)", ["d_ff=8", "d_ff=16"]),
        ("backbone.d_ff=sort(32,8,16)", ["d_ff=8", "d_ff=16", "d_ff=32"]),
        (f"{LR}=range(0.1,0.4,0.1)", ["lr=0.1", "lr=0.2", "lr=0.3"]),
        ("bank=null,there", ["bank=null", "bank=there"]),
        ("embedder='a b','c'", ["embedder=a b", "embedder=c"]),
        ("backbone.d_ff=choice(8)", ["train"]),
    ],
)  # fmt: skip
def test_hydras_grammar(word: str, titles: list[str], tmp_path: Path) -> None:
    assert [job.title for job in jobs_of(tmp_path, word)] == titles


def test_shuffled_values_are_all_there(tmp_path: Path) -> None:
    titles = [job.title for job in jobs_of(tmp_path, "seed=shuffle(range(9))")]
    assert sorted(titles) == [f"seed={n}" for n in range(9)]


def test_keys_are_short_unless_that_is_ambiguous(tmp_path: Path) -> None:
    weights = ["loss.router_z.weight=0,1", "loss.load_balancing.weight=0,1", f"{LR}=1,2"]
    assert jobs_of(tmp_path, *weights)[0].title == (
        "router_z.weight=0 load_balancing.weight=0 lr=1"
    )


def test_directories_have_short_and_plain_names(tmp_path: Path) -> None:
    long = ",".join(f"'/data/{letter * 150}'" for letter in "ab")
    for job in jobs_of(tmp_path, f"embedder={long}", "loss=[],[router_z]"):
        summary, _, key = job.path.name.rpartition("_")
        assert len(summary) <= 80
        assert summary.replace("-", "").replace("_", "").isalnum()
        assert len(key) == 10


def test_a_larger_sweep_finds_the_runs_of_a_smaller_one(tmp_path: Path) -> None:
    [first] = jobs_of(tmp_path, "router=hash")
    first.path.mkdir(parents=True)
    both = jobs_of(tmp_path, "router=hash,soft", "seed=0,1")
    assert both[0].path == first.path  # whatever it was called
    assert both[0].title == "router=hash seed=0"
    assert [job.path.is_dir() for job in both] == [True, False, False, False]


def test_the_same_experiment_is_one_job(tmp_path: Path) -> None:
    words = [f"paths.output_dir={tmp_path}", "router.top_k=2,2,1", "trainer.devices=1,2"]
    sweep = read(words)
    assert [job.title for job in sweep.source.ask()] == ["top_k=2 devices=1", "top_k=1 devices=1"]
    assert sweep.notes == ("2 jobs are the same experiment as others: each is trained once",)


def test_nothing_varied_is_a_sweep_of_one(tmp_path: Path) -> None:
    [job] = jobs_of(tmp_path, "experiment=quickstart")
    assert job.title == "quickstart"
    assert job.path.name.startswith("quickstart_")


def test_the_group_is_the_key_or_the_file_or_the_name(tmp_path: Path) -> None:
    one = [f"paths.output_dir={tmp_path}", "router=hash", "seed=0"]
    assert read([*one, "sweep=num_experts"]).group == "num_experts"
    assert read([*one, "name=mine"]).group == "mine"
    given = read([*one, "sweep=num_experts", "group='one more'"])
    assert given.folder == tmp_path / "sweeps" / "one more"
    words = given.source.preview()[0].words
    assert [word for word in words if word.startswith("group=")] == ["group='one more'"]


@pytest.mark.parametrize("name", rl.available("sweep"))
def test_every_sweep_composes(name: str, tmp_path: Path) -> None:
    trials = 2 if "interval" in (config_dir() / "sweep" / f"{name}.yaml").read_text() else None
    words = [f"paths.output_dir={tmp_path}", f"sweep={name}"]
    sweep = read(words, trials=trials)
    jobs = sweep.source.ask()
    assert sweep.group == name
    assert len(jobs) == sweep.source.total > 1
    assert not sweep.notes
    assert sweep.cfg.name in ("study", "quickstart")  # minutes a run
    assert describe("sweep", name).rstrip(".").count(" ") > 3


def test_sweep_routers_leaves_out_those_that_a_language_model_refuses() -> None:
    said = OmegaConf.load(config_dir() / "sweep" / "routers.yaml")
    [axis] = grammar.parse([f"router={said.router}"], False).axes
    left_out = {f"router={name}" for name in rl.available("router")} - set(axis.words)
    assert left_out == {"router=by_task", "router=expert_choice", "router=expert_choice_capped"}
    for word in left_out:
        with pytest.raises(ValueError, match="leak the future|data that has tasks"):
            rehearse(build_objective(compose("experiment=study", word)))


def _file(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routerlab.core.config._user_dirs", [])
    (folder / "lab" / "sweep").mkdir(parents=True)
    (folder / "lab" / "sweep" / "mine.yaml").write_text(text)
    use_directory(folder / "lab")


def test_a_file_says_what_to_vary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _file(
        tmp_path,
        "# Does this vary?\nexperiment: study\nloss: [[], [load_balancing, router_z]]\n"
        "bank: [null]\nembedder: ['1', 'a=b']\nrouter.top_k: range(1,3)\nseed: 0,1\n",
        monkeypatch,
    )
    jobs = jobs_of(tmp_path, "sweep=mine", "seed=7", "name=other")
    expected = itertools.product(["[]", "[load_balancing,router_z]"], ["1", "a=b"], "12")
    assert [job.title for job in jobs] == [
        f"loss={a} embedder={b} top_k={c}" for a, b, c in expected
    ]
    cfgs = [compose(*job.words) for job in jobs[::3]]
    assert [cfg.embedder for cfg in cfgs] == ["1", "a=b", "a=b"]
    assert {(cfg.name, cfg.seed, cfg.bank, cfg.group) for cfg in cfgs} == {
        ("other", 7, None, "mine")
    }
    assert "--config-dir" in jobs[0].command()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("router: {name: hash}", "router: give a value"),
        ("router: []", "router: give a value"),
        ("- router=hash", "must map keys"),
        ("", "must map keys"),
        ("router: [a", "mine.yaml"),
        ("sweep: routers", "no other sweep"),
        ("run_dir: here", "directory of its own"),
        ("router.topk: 1,2", "router.top_k"),
    ],
)
def test_wrong_files_are_refused(
    text: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _file(tmp_path, text, monkeypatch)
    with pytest.raises(ConfigError, match=wrong):
        read(["sweep=mine"])


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["router=hash,sofd"], "router=sofd: no such config; did you mean 'soft'"),
        (["router.topk=1,2"], "router.topk: no such key; did you mean 'router.top_k'"),
        (["rooter=hash,soft"], "rooter: no such key; did you mean 'router'"),
        (["router=glob(hahs*)"], "matches none of the choices; did you mean 'hash'"),
        (["routers=glob(*)"], "no config group 'routers'; did you mean 'router'"),
        (["sweep=router"], "sweep=router: no such sweep; did you mean 'routers'"),
        (["sweep=routers,balancing"], "one sweep at a time"),
        (["run_dir=here", "seed=0,1"], "a directory of its own"),
        (["resume=here"], "a directory of its own"),
        (["hydra/launcher=joblib"], "launcher=slurm"),
        (["hydra.sweeper.n_jobs=2"], "launcher=slurm"),
        (["group=a,b"], "one group"),
        (["group=a/b"], "name of a folder"),
        (["seed=0,1", "seed=2"], "seed is given twice"),
        (["seed=range(3,3)"], "no values"),
        (["seed=range(0,10,0)"], "a step other than 0"),
        (["seed=range(0,inf)"], "finite ends"),
        (["adapter=null,lora"], "adapter=null: Config group override must be a string"),
        (["seed=range(1e9)"], "more than 10,000 values"),
        (["seed=range(200)", "backbone.d_ff=range(200)"], "40,000 jobs"),
        (["router"], "router: not a word such as KEY=VALUE"),
        (["seed=[0,1"], "not a word such as KEY=VALUE"),
        ([BOWL], "takes --trials N; or give a list"),
        (["seed=tag(lgo,range(3))"], "no tag 'lgo'; did you mean 'log'"),
        (["router.top_k=tag(log,choice(1,2))"], "the tag log is for interval"),
        (["embedder=${nothing}"], "nothing"),
    ],
)
def test_wrong_words_are_refused(words: Sequence[str], wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(words)
    assert wrong in str(caught.value)


@pytest.mark.parametrize(
    ("words", "options", "wrong"),
    [
        ([BOWL], {"trials": 0}, "--trials=0: must be at least 1"),
        (
            [BOWL],
            {"trials": 2, "search": "tep"},
            "--search=tep: no such search; did you mean 'tpe'",
        ),
        ([BOWL], {"search": "tpe"}, "--trials N"),
        ([BOWL], {"trials": 2, "metric": "loss"}, "only --search tpe"),
        (["router=hash,soft"], {"trials": 2}, "nothing to draw"),
        (["router.top_k=shuffle(choice(1,2))"], {"trials": 2}, "without shuffle()"),
        ([f"{LR}=interval(2,1)"], {"trials": 2}, "first end must be below the second"),
        ([f"{LR}=interval(1,inf)"], {"trials": 2}, "both finite"),
        ([f"{LR}=tag(log,interval(0,1))"], {"trials": 2}, "above 0"),
        (["seed=interval(0,1)"], {"trials": 2}, "seeds are a list"),
        (["optimizer.lr=interval(0,1)"], {"trials": 2}, "optimizer.optimizer.lr"),
        (["optimizer.lr=interval(0,1)"], {"trials": 2, "search": "tpe"}, "optimizer.optimizer.lr"),
        (["router=choice(hash,sofd)"], {"trials": 1, "search": "tpe"}, "did you mean 'soft'"),
        ([BOWL, "launcher.workers=0"], {"trials": 1, "search": "tpe"}, "launcher.workers=0"),
    ],
)
def test_wrong_searches_are_refused(words: list[str], options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(words, **options)
    assert wrong in str(caught.value)


def test_defining_a_sweep_imports_neither_torch_nor_optuna() -> None:
    code = (
        "import sys; from routerlab.sweeps.definition import read; read(['seed=0,1']); "
        "print(sorted({'torch', 'lightning', 'optuna', 'wandb'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
