"""The report, opened in a real browser and read back from it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from routerlab.reports.html import write_report
from tests.reports.conftest import DOMAINS, LAYERS

LINES = "svg .scatterlayer .trace path.js-line"
# Figure -> curves: layers and their mean in each router panel, two auxiliary losses twice.
PANEL = len(LAYERS) + 1
LINE_FIGURES = {
    "fig-loss": 6,
    "fig-entropy": 4 * PANEL,
    "fig-aux": 4,
    "fig-diagnostics": 5 * PANEL,
    "fig-training": 3,
}
HEAT_MAPS = ["fig-load", "fig-domains"]
RUN_FILES = [
    "config.yaml",
    "overrides.yaml",
    "environment.json",
    "status.json",
    "metrics.csv",
    "distributions.jsonl",
    "summary.json",
]


def open_page(chromium: Chrome, path: Path) -> None:
    """Loads a file in an empty tab with emptied logs."""
    chromium.get("about:blank")
    chromium.get_log("browser")
    chromium.get_log("performance")
    chromium.get(path.as_uri())


def console_errors(chromium: Chrome) -> list[str]:
    return [x["message"] for x in chromium.get_log("browser") if x["level"] == "SEVERE"]


def requests(chromium: Chrome) -> list[str]:
    """Addresses that the page asked for besides itself and data it carries."""
    messages = [json.loads(entry["message"]) for entry in chromium.get_log("performance")]
    events = [m["message"] for m in messages]
    sent = [e["params"]["request"]["url"] for e in events if e["method"].endswith("WillBeSent")]
    loaded = chromium.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    own = chromium.current_url
    return [
        url for url in [*sent, *loaded] if url != own and not url.startswith(("data:", "blob:"))
    ]


def drawn(chromium: Chrome, figure: str, selector: str) -> int:
    """How many marks of a figure take up room on the screen."""
    script = (
        "return [...document.querySelectorAll(arguments[0])]"
        ".filter(mark => mark.getBoundingClientRect().width > 0).length"
    )
    return chromium.execute_script(script, f"#{figure} {selector}")


def text(chromium: Chrome, selector: str) -> str:
    return chromium.find_element(By.CSS_SELECTOR, selector).text


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_page_opens_without_errors_or_requests(chromium: Chrome, run_dir: Path) -> None:
    page = write_report(run_dir)
    assert page == run_dir / "report.html"
    assert not (run_dir / "report.html.tmp").exists()
    open_page(chromium, page)
    assert console_errors(chromium) == []
    assert requests(chromium) == []
    assert text(chromium, ".run") == "quickstart top_k"
    assert text(chromium, "#state") == "done"
    assert not chromium.find_elements(By.CSS_SELECTOR, "#error, #notes")


def test_the_two_guards_notice_a_bad_page(chromium: Chrome, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/x.png'><script>nowhere()</script>")
    open_page(chromium, bad)
    assert any("nowhere" in message for message in console_errors(chromium))
    assert any("127.0.0.1:9" in url for url in requests(chromium))


def test_every_figure_is_drawn_and_says_how_to_read_it(chromium: Chrome, run_dir: Path) -> None:
    open_page(chromium, write_report(run_dir))
    lines = {figure: drawn(chromium, figure, LINES) for figure in LINE_FIGURES}
    assert lines == LINE_FIGURES
    for figure in HEAT_MAPS:
        assert drawn(chromium, figure, "svg .heatmaplayer image") == len(LAYERS), figure
    for figure in [*LINE_FIGURES, *HEAT_MAPS]:
        assert len(text(chromium, f"#{figure}-card .caption")) > 40, figure


def test_headline_numbers(chromium: Chrome, run_dir: Path) -> None:
    open_page(chromium, write_report(run_dir))
    tiles = text(chromium, ".tiles").splitlines()
    for shown in (
        "2.312",
        "−0.675",
        "22.6% better",
        "13.2k",
        "2.35M",
        "1m 33s",
        "of 32 in 4 layers",
    ):
        assert shown in tiles
    bits = text(chromium, "#bits")
    assert re.search(r"trigram 2\.987 \+0\.675", bits)
    assert re.search(r"code 1\.930 −0\.382", bits)


def test_baselines_are_in_the_loss_figure(chromium: Chrome, run_dir: Path) -> None:
    open_page(chromium, write_report(run_dir))
    legend = chromium.execute_script("return document.querySelector('#fig-loss').textContent")
    for label in ("unigram 4.731", "bigram 3.652", "trigram 2.987", "validation"):
        assert label in legend


def test_loads_are_relative_to_an_even_share(chromium: Chrome, run_dir: Path) -> None:
    path = run_dir / "distributions.jsonl"
    rows = [
        {"step": 0, "name": "router/layers.00/expert_load", "value": [0.5, 0.25, 0.25, 0.0]},
        {"step": 9, "name": "val/router/layers.00/expert_by_domain", "value": [[2, 0], [1, 1]]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    open_page(chromium, write_report(run_dir))
    script = (
        "return Array.from(document.querySelector(arguments[0])._fullData[0].z).map(r => [...r])"
    )
    assert chromium.execute_script(script, "#fig-load") == [[2], [1], [1], [0]]
    assert chromium.execute_script(script, "#fig-domains") == [[2, 0], [1, 1]]


def test_markup_in_values_is_shown_not_run(chromium: Chrome, run_dir: Path) -> None:
    edit_json(run_dir / "summary.json", name="<script>document.title='hacked'</script>")
    page = write_report(run_dir)
    assert "<script>alert" not in page.read_text()
    open_page(chromium, page)
    assert chromium.title.startswith("<script>document.title='hacked'</script>")
    chromium.find_element(By.CSS_SELECTOR, "#config summary").click()
    assert "<script>alert('x')</script>" in text(chromium, "#config pre")
    assert DOMAINS[2] in text(chromium, "#bits")
    labels = chromium.find_elements(By.CSS_SELECTOR, "#fig-domains .ytick text")
    assert DOMAINS[2] in {label.text for label in labels}


def test_failed_run_opens_with_its_error(chromium: Chrome, run_dir: Path) -> None:
    error = "Traceback:\nRuntimeError: loss is <nan> at step 3"
    edit_json(run_dir / "status.json", state="failed", error=error)
    for name in ("summary.json", "distributions.jsonl", "environment.json"):
        (run_dir / name).unlink()
    open_page(chromium, write_report(run_dir))
    assert console_errors(chromium) == []
    assert text(chromium, "#state") == "failed"
    box = chromium.find_element(By.ID, "error")
    assert "RuntimeError: loss is <nan> at step 3" in box.text
    assert box.rect["y"] < chromium.find_element(By.CLASS_NAME, "tiles").rect["y"]
    assert drawn(chromium, "fig-loss", LINES) == 3


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_missing_file_is_named(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    notes = re.findall(r"<li>(.*?)</li>", write_report(run_dir).read_text())
    assert notes == [f"{name} is missing."]


@pytest.mark.parametrize("name", ["summary.json", "status.json", "environment.json"])
@pytest.mark.parametrize("content", ['{"state": "do', "[1, 2]", "", '{"val": 3, "layers": [4]}'])
def test_partial_json_is_tolerated(run_dir: Path, name: str, content: str) -> None:
    (run_dir / "metrics.csv").write_text("step\n")
    (run_dir / name).write_text(content)
    page = write_report(run_dir).read_text()
    readable = content.endswith("]}")
    assert (f"<li>{name} " in page) is not readable


def test_empty_run_directory(chromium: Chrome, tmp_path: Path) -> None:
    open_page(chromium, write_report(tmp_path))
    assert console_errors(chromium) == []
    missing = [item.text for item in chromium.find_elements(By.CSS_SELECTOR, "#notes li")]
    assert sorted(missing) == sorted(f"{name} is missing." for name in RUN_FILES)
    assert "no data" in text(chromium, "#fig-loss-card")


def test_not_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_torn_last_lines_are_ignored_and_named(chromium: Chrome, run_dir: Path) -> None:
    whole = write_report(run_dir).read_text()
    for name, torn in (("metrics.csv", "301,9"), ("distributions.jsonl", '{"step": 303, "na')):
        with (run_dir / name).open("a") as file:
            file.write(torn)
    page = write_report(run_dir)
    open_page(chromium, page)
    assert console_errors(chromium) == []
    notes = text(chromium, "#notes")
    assert "last line of metrics.csv was torn" in notes
    assert "last line of distributions.jsonl was torn" in notes
    without_notes = re.sub(r'<div id="notes".*?</div>', "", page.read_text())
    assert without_notes == whole


def test_plotly_is_inlined_exactly_once(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    assert len(re.findall(r"plotly\.js v\d", page)) == 1
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", page)


def test_the_report_needs_nothing_but_the_run_directory(run_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run_dir, moved)
    assert write_report(moved).read_text() == write_report(run_dir).read_text()
