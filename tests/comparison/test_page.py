"""The page of a comparison, opened in a real browser and read back from it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from routerlab.analysis import trace
from routerlab.comparison.curves import band, final_loads
from routerlab.comparison.figures import MAX_GROUPS, shortened
from routerlab.comparison.page import write_page
from routerlab.comparison.runs import Run, load_runs
from routerlab.comparison.table import Comparison, compare_groups
from routerlab.reports.run_files import Curve
from tests.helpers.runs import finished_run
from tests.helpers.traces import random_sets, traced
from tests.reports.test_html import console_errors, drawn, open_page, requests, text

LINES = "svg .scatterlayer .trace path.js-line"
LAYERS, EXPERTS, VALIDATIONS = 2, 4, (10, 20, 30)
ROUTER = ("load_entropy", "max_violation", "mean_entropy", "mutual_information")
BITS = {("token_choice", 0): 3.0, ("token_choice", 1): 3.2, ("hash", 0): 3.1, ("hash", 1): 3.4}
SECTIONS = ("table", *(f"fig-{x}-card" for x in
            ("curves", "router", "loads", "agreement", "churn")))  # fmt: skip


def rows(bits: float) -> list[dict[str, float]]:
    """Metrics that fall to ``bits`` at the last of three validations."""
    found = []
    for step in range(1, 31):
        fallen = bits + 3 * math.exp(-step / 4)
        found.append({"step": step, "train/loss": fallen, "router/mean/mutual_information": 0.1})
        found[-1] |= {f"router/mean/{name}": 0.5 + 0.01 * bits for name in ROUTER[:3]}
        if step in VALIDATIONS:
            found.append({"step": step, "val/bits_per_byte": bits + (30 - step) / 10})
    return found


def save_distributions(run: Path) -> None:
    """Loads at two training steps and two validations: expert 0 of the last one has half of all."""
    last = [0.5, 0.25, 0.25, 0.0]
    with (run / "distributions.jsonl").open("w") as file:
        for step, prefix, load in (
            (1, "router", [0.25] * 4), (10, "val/router", [0.25] * 4), (30, "val/router", last),
            (30, "router", [1.0, 0.0, 0.0, 0.0]),
        ):  # fmt: skip
            for layer in range(LAYERS):
                name = f"{prefix}/layers.{layer:02d}/expert_load"
                file.write(json.dumps({"step": step, "name": name, "value": load}) + "\n")
        file.write('{"step": 40, "name": "val/router/layers.00/expert_load", "va')  # torn


def save_traces(run: Path, seeds: tuple[int, ...]) -> None:
    """The routings of those seeds at the validations; the last is the final one."""
    for step, seed in zip(VALIDATIONS, seeds, strict=True):
        found = traced(*(random_sets(256, EXPERTS, 2, seed=seed + i) for i in range(LAYERS)))
        trace.save(run / "traces" / f"step_{step:06d}.safetensors", found)
    trace.save(run / "traces" / "validation.safetensors", found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two routers of two seeds, one of them the same routing from the first validation on, and a
    third of one seed that leaks and keeps no traces.
    """
    folder = tmp_path_factory.mktemp("runs")
    for number, ((router, seed), bits) in enumerate(BITS.items()):
        words = [f"router={router}", f"seed={seed}"]
        run = finished_run(folder / f"{router}_{seed}", words, bits=bits, rows=rows(bits))
        (run / "report.html").write_text("its report")
        save_distributions(run)
        fixed = router == "hash"
        save_traces(run, (7, 7, 7) if fixed else (100 * number, 100 * number, 100 * number + 50))
    words = ["router=expert_choice", "objective.allow_noncausal=true"]
    leaks = {"looks_ahead": "in evaluation"}
    finished_run(folder / "leaky", words, bits=1.0, rows=rows(1.0), summary=leaks)
    return folder


@pytest.fixture(scope="module")
def comparison(folder: Path) -> Comparison:
    return compare_groups(load_runs([folder])[0])


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "routers.html"
    assert write_page(comparison, path, "routerlab compare <here>") == path
    return path


def plotted(chromium: Chrome, figure: str, name: str) -> list[list[float]]:
    """The y values of a figure's lines of that name."""
    script = (
        "return document.querySelector(arguments[0])._fullData"
        ".filter(t => t.name === arguments[1] && t.line && t.line.width).map(t => [...t.y])"
    )
    return chromium.execute_script(script, f"#{figure}", name)


def test_it_opens_without_errors_or_requests(chromium: Chrome, page: Path) -> None:
    open_page(chromium, page)
    assert console_errors(chromium) == []
    assert requests(chromium) == []
    assert not list(page.parent.glob("*.tmp"))
    assert [x.get_attribute("id") for x in chromium.find_elements(By.TAG_NAME, "section")] == [
        *SECTIONS
    ]
    assert text(chromium, ".run") == "val/bits_per_byte by router"
    assert text(chromium, ".badge") == "3 groups, 5 runs"
    assert text(chromium, ".chips") == "routerlab compare <here>"


def test_the_table_and_what_makes_it_unfair_come_first(chromium: Chrome, page: Path) -> None:
    open_page(chromium, page)
    table = text(chromium, "#table")
    for shown in ("token_choice", "hash", "expert_choice", "3.1000 ± 1.2706", "baseline"):
        assert shown in table
    warnings = chromium.find_element(By.ID, "warnings")
    assert "not those of a language model" in warnings.text
    assert warnings.rect["y"] < chromium.find_element(By.ID, "table").rect["y"]
    chromium.find_element(By.CSS_SELECTOR, "#differences summary").click()
    assert "router._target_" in text(chromium, "#differences")


def test_every_figure_is_drawn(chromium: Chrome, page: Path) -> None:
    open_page(chromium, page)
    lines = {name: drawn(chromium, name, LINES) for name in ("fig-curves", "fig-router")}
    assert lines == {"fig-curves": 2 * 3, "fig-router": 4 * 3}
    assert drawn(chromium, "fig-churn", LINES) == 2 * 2
    assert drawn(chromium, "fig-loads", "svg .heatmaplayer image") == 2
    assert drawn(chromium, "fig-agreement", "svg .heatmaplayer image") == 1


def test_curves_are_means_over_seeds_with_their_intervals(chromium: Chrome, page: Path) -> None:
    """3.0 and 3.2 at the end: mean 3.1, and 12.7062 * 0.141421 / sqrt(2) = 1.27062 around it."""
    open_page(chromium, page)
    bits, train = plotted(chromium, "fig-curves", "token_choice")
    assert bits == pytest.approx([5.1, 4.1, 3.1])
    assert len(train) == 30
    script = (
        "return document.querySelector('#fig-curves')._fullData"
        ".filter(t => t.fill === 'toself' && t.legendgroup === arguments[0]).map(t => [...t.y])"
    )
    shade = chromium.execute_script(script, "token_choice")[0]
    assert shade == pytest.approx([m + s * 1.27062 for s, ms in ((1, bits), (-1, bits[::-1]))
                                   for m in ms], abs=1e-4)  # fmt: skip
    assert chromium.execute_script(script, "expert_choice") == []


def test_loads_are_those_of_the_last_validation(chromium: Chrome, page: Path) -> None:
    open_page(chromium, page)
    script = "return [...document.querySelector('#fig-loads')._fullData[0].z].map(r => [...r])"
    assert chromium.execute_script(script) == [[2, 1, 1, 0]] * LAYERS


def test_agreement_and_what_it_lacks(chromium: Chrome, page: Path, comparison: Comparison) -> None:
    open_page(chromium, page)
    script = (
        "const t = document.querySelector('#fig-agreement')._fullData[0];"
        "return [[...t.x], [...t.z].map(r => [...r])]"
    )
    names, cells = chromium.execute_script(script)
    assert names == [group.label for group in comparison.groups[1:]] == ["token_choice", "hash"]
    assert cells[1][1] == 1.0
    assert cells[0][1] == cells[1][0] == pytest.approx(0, abs=0.15)
    assert cells[0][0] == pytest.approx(0, abs=0.15)
    card = text(chromium, "#fig-agreement-card")
    assert "expert_choice – hash: no recorded routing (trace_sequences=0)." in card
    assert "expert_choice, seed 0: 0 traces at validations" in text(chromium, "#fig-churn-card")


def test_churn_and_saturation(chromium: Chrome, page: Path) -> None:
    """token_choice changes once, between the second and the third validation."""
    open_page(chromium, page)
    assert plotted(chromium, "fig-churn", "hash") == [[0, 0], [1, 1, 1]]
    churn, saturation = plotted(chromium, "fig-churn", "token_choice")
    assert churn == pytest.approx([0, 0.5], abs=0.05)
    assert saturation == pytest.approx([1 - churn[1], 1 - churn[1], 1])


def test_runs_are_linked_to_their_reports(chromium: Chrome, page: Path, folder: Path) -> None:
    open_page(chromium, page)
    chromium.find_element(By.CSS_SELECTOR, "#runs summary").click()
    assert "leaky" in text(chromium, "#runs")
    links = chromium.find_elements(By.CSS_SELECTOR, "#runs a")
    expected = {(folder / f"{router}_{seed}" / "report.html").as_uri() for router, seed in BITS}
    assert {link.get_property("href") for link in links} == expected


def remote(label: str, seed: int, bits: float) -> Run:
    """A run as it comes from W&B."""
    history = pd.DataFrame(rows(bits))
    return Run(
        name=f"{label} {seed}",
        path=None,
        config={"seed": seed, "name": label},
        choices={"router": label},
        state="done",
        summary={"val": {"bits_per_byte": bits}},
        environment={},
        at="",
        history=lambda: history,
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty groups with long names that begin and end alike; the last is the baseline."""
    names = [f"<b>a_router_with_a_long_name_{i:02d}_and_a_tail" for i in range(19)]
    runs = [remote(n, s, 2 + 0.1 * i + 0.01 * s) for i, n in enumerate(names) for s in (0, 1)]
    runs += [remote("token_choice", seed, 9.0 + seed) for seed in (0, 1)]
    path = tmp_path_factory.mktemp("many") / "page.html"
    return write_page(compare_groups(runs), path)


def test_of_many_groups_the_best_and_the_baseline_are_drawn(chromium: Chrome, many: Path) -> None:
    open_page(chromium, many)
    assert console_errors(chromium) == []
    assert "12 of 20 groups: the best ones and the baseline, token_choice" in text(
        chromium, "#table"
    )
    assert drawn(chromium, "fig-curves", LINES) == 2 * MAX_GROUPS
    entries = [x.text for x in chromium.find_elements(By.CSS_SELECTOR, "#fig-curves .legendtext")]
    assert len(set(entries)) == len(entries) == MAX_GROUPS
    assert entries[-1] == "token_choice"
    assert "<b>a_router" in entries[0]
    assert "None of these runs recorded the loads" in text(chromium, "#fig-loads-card")
    assert "W&B" in text(chromium, "#fig-agreement-card")


def test_groups_can_be_told_apart(chromium: Chrome, many: Path) -> None:
    open_page(chromium, many)
    script = (
        "return document.querySelector('#fig-curves')._fullData.filter(t => t.showlegend)"
        ".map(t => t.line.color + t.line.dash)"
    )
    styles = chromium.execute_script(script)
    assert len(set(styles)) == len(styles) == MAX_GROUPS


@pytest.mark.parametrize("figure", ["fig-curves", "fig-router"])
def test_legends_do_not_cover_panels_or_titles(chromium: Chrome, many: Path, figure: str) -> None:
    open_page(chromium, many)
    script = (
        "const box = e => e.getBoundingClientRect(), d = document.getElementById(arguments[0]);"
        "const legend = box(d.querySelector('.legend')), frame = box(d);"
        "const others = [...d.querySelectorAll('rect.nsewdrag, .annotation-text')];"
        "return [others.length, others.filter(e => { const b = box(e); return b.right > legend.left"
        " && b.left < legend.right && b.bottom > legend.top && b.top < legend.bottom }).length,"
        " legend.right <= frame.right && legend.bottom <= frame.bottom]"
    )
    others, covered, inside = chromium.execute_script(script, figure)
    assert others >= 4
    assert covered == 0
    assert inside


def test_real_runs(train: Callable[..., Path], tmp_path: Path) -> None:
    """Traces, loads and curves as runs write them."""
    paths = [train(f"router={r}", "trace_validations=true") for r in ("token_choice", "hash")]
    page = write_page(compare_groups(load_runs(paths)[0]), tmp_path / "page.html").read_text()
    assert "None of these runs" not in page
    assert "Left out" not in page


def test_a_band_is_over_the_steps_that_all_seeds_have() -> None:
    """3 and 5: mean 4, sd 1.41421, half 12.7062 * 1.41421 / sqrt(2) = 12.7062."""
    seeds = [
        Curve(np.array([1.0, 2.0, 4.0]), np.array([9.0, 3.0, 1.0])),
        Curve(np.array([2.0, 3.0, 4.0]), np.array([5.0, 9.0, 1.0])),
        Curve(np.empty(0), np.empty(0)),
    ]
    found = band(seeds)
    assert found is not None
    assert found.half is not None
    assert found.steps.tolist() == [2, 4]
    assert found.mean.tolist() == [4, 1]
    assert found.half == pytest.approx([12.7062, 0], abs=1e-4)
    assert band(seeds[2:]) is None
    single = band(seeds[:1])
    assert single is not None
    assert single.half is None


def test_long_curves_are_thinned() -> None:
    steps = np.arange(2000.0)
    found = band([Curve(steps, steps * k) for k in (1, 3)])
    assert found is not None
    assert len(found.steps) == 300
    assert found.mean == pytest.approx(2 * found.steps)


def test_final_loads_without_validations_are_those_of_training(tmp_path: Path) -> None:
    assert final_loads(tmp_path) == {}
    save_distributions(tmp_path)
    path = tmp_path / "distributions.jsonl"
    path.write_text("".join(x + "\n" for x in path.read_text().splitlines() if '"val/' not in x))
    found = final_loads(tmp_path)
    assert list(found) == ["layers.00", "layers.01"]
    assert found["layers.01"].tolist() == [1, 0, 0, 0]


def test_long_labels_keep_their_ends() -> None:
    short = shortened("router=token_choice, router.capacity_factor=1.25")
    assert len(short) == 34
    assert short.startswith("router=token_choi…")
    assert short.endswith("_factor=1.25")
