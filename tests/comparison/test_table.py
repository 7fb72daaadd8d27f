"""Groups, their means and differences, by hand; what cannot be compared is said."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from routerlab.comparison.runs import Run, load_runs
from routerlab.comparison.statistics import differences, holm, interval, t_test
from routerlab.comparison.table import Comparison, Row, compare_groups, direction
from routerlab.core.config import ConfigError
from tests.helpers.runs import finished_run

# bits per byte of three routers, seeds 0 to 2
BITS = {
    "token_choice": [3.0, 3.2, 3.1],
    "hash": [3.1, 3.3, 3.23],
    "random": [2.9, 3.0, 3.02],
}


@pytest.fixture(scope="session")
def three_routers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    for router, values in BITS.items():
        for seed, bits in enumerate(values):
            words = [f"router={router}", f"seed={seed}"]
            finished_run(folder / f"{router}_{seed}", words, bits=bits)
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., list[Run]]:
    """Runs named a, b, c ... of the words given for each, with the same settings."""

    def runs(*words: Sequence[str], **settings: object) -> list[Run]:
        count = len(list(tmp_path.iterdir()))
        for place, of_run in enumerate(words, count):
            finished_run(tmp_path / chr(ord("a") + place), of_run, **settings)  # type: ignore[arg-type]
        return load_runs([tmp_path])[0]

    return runs


def row(comparison: Comparison, label: str) -> Row:
    """The row of a group."""
    return next(row for row in comparison.rows if row["label"] == label)


def test_means_and_differences_by_hand(three_routers: Path) -> None:
    found = compare_groups(load_runs([three_routers])[0])
    assert (found.metric, found.by, found.better) == ("val/bits_per_byte", ["router"], "lower")
    assert [group.label for group in found.groups] == ["random", "token_choice", "hash"]
    assert [row["label"] for row in found.rows] == ["random", "token_choice", "hash"]
    assert found.baseline == "token_choice"
    best = row(found, "random")
    # mean 2.97333, sd 0.0642910: half 4.302653 * 0.0642910 / sqrt(3) = 0.159708
    assert best["mean"] == pytest.approx(2.973333, abs=1e-6)
    assert best["half"] == pytest.approx(0.159708, abs=1e-6)
    assert (best["best"], best["best_run"], best["seeds"]) == (2.9, "random_0", 3)
    assert [r["is_best"] for r in found.rows] == [True, False, False]
    # hash - token_choice: 0.1, 0.1, 0.13: mean 0.11, sd 0.0173205, half 0.0430265, t = 11
    worse = row(found, "hash")
    assert worse["difference"] == pytest.approx(0.11)
    assert worse["difference_half"] == pytest.approx(0.0430265, abs=1e-6)
    assert worse["p"] == pytest.approx(1 - 11 / (2 + 11**2) ** 0.5)  # closed form for df 2
    assert worse["pairs"] == 3
    base = row(found, "token_choice")
    assert (base["difference"], base["p"], base["p_holm"], base["pairs"]) == (None, None, None, 0)


def test_p_values_are_corrected_over_the_rows(three_routers: Path) -> None:
    found = compare_groups(load_runs([three_routers])[0], baseline="hash")
    assert found.baseline == "hash"
    labels = ["token_choice", "random"]
    by_seed = [dict(enumerate(BITS[label])) for label in labels]
    raw = [t_test(differences(values, dict(enumerate(BITS["hash"])))) for values in by_seed]
    assert [row(found, label)["p"] for label in labels] == raw
    expected = holm([p for p in raw if p is not None])
    assert [row(found, label)["p_holm"] for label in labels] == expected
    smaller = row(found, "token_choice")
    assert smaller["p"] is not None
    assert smaller["p_holm"] == 2 * smaller["p"]
    half = interval([a - b for a, b in zip(BITS["random"], BITS["hash"], strict=True)]).half
    assert row(found, "random")["difference_half"] == half


def test_costs_and_what_differs(three_routers: Path) -> None:
    found = compare_groups(load_runs([three_routers])[0])
    first = found.rows[0]
    assert first["active_parameters"] == 35296
    assert first["total_parameters"] == 47584
    assert (first["tokens"], first["steps"], first["tokens_per_second"]) == (1024, 4, 2048)
    assert first["flops_per_token"] is None
    assert list(found.varying)[0] == "router"
    assert found.varying["router"] == {name: name for name in BITS}
    assert found.varying["router.seed"]["hash"] == 0  # of its table, and not of the run
    assert found.varying["router.seed"]["token_choice"] is None
    assert not {"seed", "data.seed", "backbone.d_model"} & found.varying.keys()
    assert found.warnings == []


def test_one_group_has_no_baseline(make: Callable[..., list[Run]]) -> None:
    found = compare_groups(make(["seed=0"], ["seed=1"]))
    assert found.baseline is None
    assert [(r["label"], r["seeds"], r["difference"]) for r in found.rows] == [
        ("token_choice", 2, None)
    ]
    assert found.rows[0]["is_best"] is False  # of one
    assert compare_groups(make(), baseline="token_choice").baseline is None


def test_the_first_group_is_the_baseline_where_token_choice_is_not(
    make: Callable[..., list[Run]],
) -> None:
    make(["router=switch"], bits=3.0)
    found = compare_groups(make(["router=hash"], bits=2.0))
    assert [r["label"] for r in found.rows] == ["hash", "switch"]  # the better first
    assert found.baseline == "switch"  # of the first run


def test_one_seed_has_no_interval(make: Callable[..., list[Run]]) -> None:
    make(["seed=0"], bits=3.0)
    found = compare_groups(make(["router=hash", "seed=0"], ["router=random", "seed=1"], bits=2.5))
    one, apart = row(found, "hash"), row(found, "random")
    assert (one["half"], one["difference"], one["difference_half"]) == (None, -0.5, None)
    assert (one["p"], one["p_holm"], one["pairs"]) == (None, None, 1)
    assert (apart["difference"], apart["pairs"]) == (None, 0)
    assert "No seed in common with token_choice, so no difference: random." in found.notes
    assert any("without interval or p-value: hash." in note for note in found.notes)


def test_groups_by_keys(make: Callable[..., list[Run]]) -> None:
    grid = [[f"router.top_k={k}", f"seed={s}", f"loss=[{loss}]"]
            for k in (1, 2) for s in (0, 1) for loss in ("router_z", "")]  # fmt: skip
    runs = make(*grid)
    by_key = compare_groups(runs, ["router.top_k"])
    assert sorted(r["label"] for r in by_key.rows) == ["top_k=1", "top_k=2"]
    assert all(r["marks"] == ["mixed"] for r in by_key.rows)  # of two losses
    both = compare_groups(runs, ["router.top_k", "loss"])
    assert sorted(r["label"] for r in both.rows) == [
        "top_k=1, none", "top_k=1, router_z", "top_k=2, none", "top_k=2, router_z",
    ]  # fmt: skip
    assert all(r["marks"] == [] and r["seeds"] == 2 for r in both.rows)
    assert both.varying["router.top_k"]["top_k=1, none"] == 1


def test_without_different_routers_what_varies_makes_the_groups(
    make: Callable[..., list[Run]],
) -> None:
    make(["seed=0"], ["seed=1"])
    make(["optimizer.optimizer.lr=0.01", "seed=0"])
    found = compare_groups(make(["balancer=expert_bias", "seed=1"]))
    assert found.by == ["balancer", "optimizer.optimizer.lr"]
    labels = {"none, lr=0.003", "none, lr=0.01", "expert_bias, lr=0.003"}
    assert {r["label"] for r in found.rows} == labels
    said = "All runs have the same router: they are grouped by balancer, optimizer.optimizer.lr."
    assert said in found.notes


def test_a_group_that_mixes_is_marked(make: Callable[..., list[Run]]) -> None:
    make(["router=hash", "seed=0"])
    make(["seed=0", "router.top_k=1"], ["seed=1", "router.top_k=2"])
    found = compare_groups(make(["seed=2", "router.top_k=2"]))
    assert row(found, "token_choice")["marks"] == ["mixed"]
    assert row(found, "hash")["marks"] == []
    [said] = [w for w in found.warnings if "mixes" in w]
    assert said.startswith("token_choice mixes runs that differ in router.top_k (--by router,")
    apart = compare_groups(make(), ["router", "router.top_k"])
    assert {r["label"] for r in apart.rows} == {
        "hash, top_k=2", "token_choice, top_k=1", "token_choice, top_k=2",
    }  # fmt: skip


def test_of_two_runs_of_a_seed_the_newer_counts(make: Callable[..., list[Run]]) -> None:
    make(["seed=0"], bits=9.0, minutes=30)
    make(["seed=0"], bits=1.0, minutes=60)
    found = compare_groups(make(["seed=0"], bits=5.0, minutes=10))
    assert found.rows[0]["values"] == {0: 1.0}
    assert found.groups[0].runs[0].name == "b"
    assert found.warnings == [
        "token_choice: of several runs of a seed the newest counts: seed 0 b (not a, c)."
    ]


def test_unfinished_runs_are_counted_and_left_out(make: Callable[..., list[Run]]) -> None:
    make(["seed=0"], ["seed=1"])
    make(["seed=2"], ["router=hash", "seed=0"], state="failed", bits=None)
    found = compare_groups(make(["seed=3"], state="running"))
    assert [r["label"] for r in found.rows] == ["token_choice"]
    assert found.rows[0]["seeds"] == 2
    assert found.rows[0]["unfinished"] == {"failed": 1, "cut": 1}
    assert "Not finished, left out: 3 runs (c: failed, d: failed, e: cut)." in found.warnings
    assert "hash has no finished run with val/bits_per_byte." in found.warnings


def test_without_finished_runs(make: Callable[..., list[Run]]) -> None:
    runs = make(["seed=0"], state="failed", bits=None)
    with pytest.raises(ConfigError, match=r"no finished runs: 1 run \(a: failed\)"):
        compare_groups(runs)


def test_metrics(make: Callable[..., list[Run]]) -> None:
    make(["seed=0"], rows=[{"step": 1, "train/loss": 3.5}, {"step": 2, "train/loss": 3.25}])
    runs = make(["seed=1"], rows=[{"step": 1, "val/loss": 2.0}])
    found = compare_groups(runs, metric="train/loss")
    assert found.rows[0]["values"] == {0: 3.25}
    assert "Without train/loss, left out: 1 run (b)." in found.warnings
    with pytest.raises(ConfigError, match=r"no finished run has it; did you mean 'train/loss'"):
        compare_groups(runs, metric="train/los")
    with pytest.raises(ConfigError, match="did you mean 'val/bits_per_byte'"):
        compare_groups(runs, metric="bits_per_byte")
    nan = make(["seed=2"], rows=[{"step": 1, "router/mean/load_cv": float("nan")}])
    with pytest.raises(ConfigError, match="no finished run has a finite value"):
        compare_groups(nan, metric="router/mean/load_cv")


def test_accuracy_is_better_when_higher(make: Callable[..., list[Run]]) -> None:
    for router, accuracy in (("hash", 0.6), ("random", 0.8), ("token_choice", 0.7)):
        val = {"val": {"loss": 1.0, "accuracy": accuracy}}
        make([f"router={router}", "seed=0"], summary=val)
    found = compare_groups(make())
    assert (found.metric, found.better) == ("val/accuracy", "higher")
    assert [r["label"] for r in found.rows] == ["random", "token_choice", "hash"]
    assert found.rows[0]["is_best"]


def test_directions() -> None:
    lower = ("val/loss", "train/bits_per_byte", "val/bits_per_byte/code", "loss/router_z")
    assert {direction(metric) for metric in lower} == {"lower"}
    assert direction("val/accuracy/quartz") == direction("train/tokens_per_second") == "higher"
    assert direction("router/mean/load_entropy") is None


def test_where_neither_direction_is_better_none_is_best(make: Callable[..., list[Run]]) -> None:
    runs = make(["router=random"], ["router=hash"])
    found = compare_groups(runs, metric="router/mean/load_entropy")
    assert [(r["label"], r["best"], r["is_best"]) for r in found.rows] == [
        ("hash", None, False), ("random", None, False),
    ]  # fmt: skip


def test_long_runs_are_read_fast(tmp_path: Path) -> None:
    # 200 runs of 2,000 steps are to take 10 s, so these 20 one; types are checked here, which costs
    names = [f"router/layers.{layer:02d}/metric_{i}" for layer in range(8) for i in range(12)]
    rows = [{"step": s, "train/loss": 4 / s, **dict.fromkeys(names, 1 / s)} for s in range(1, 2001)]
    first = finished_run(tmp_path / "hash_0", ["router=hash"], rows=rows)
    for seed in range(1, 20):
        other = finished_run(tmp_path / f"hash_{seed}", ["router=hash", f"seed={seed}"])
        shutil.copy(first / "metrics.csv", other)
    start = time.process_time()
    found = compare_groups(load_runs([tmp_path])[0], metric="train/loss")
    assert time.process_time() - start < 3
    assert found.rows[0]["mean"] == pytest.approx(4 / 2000)
    assert found.rows[0]["seeds"] == 20


def test_wrong_names(three_routers: Path) -> None:
    runs = load_runs([three_routers])[0]
    with pytest.raises(ConfigError, match=r"--by router.topk: .* 'router.top_k'"):
        compare_groups(runs, ["router.topk"])
    with pytest.raises(ConfigError, match=r"--by routr: .* 'router'"):
        compare_groups(runs, ["routr"])
    with pytest.raises(ConfigError, match=r"--baseline tokenchoice: .* 'token_choice'"):
        compare_groups(runs, baseline="tokenchoice")
