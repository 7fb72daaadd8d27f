"""The report of a fine-tuning run, opened in a real browser."""

import json
import re
import shutil
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from routerlab.reports.figures import MAX_LAYERS, thinned
from routerlab.reports.html import write_report
from tests.reports.test_html import LINES, console_errors, drawn, open_page, requests, text
from tests.reports.tuned import LAYERS, write_tuned

LINE_FIGURES = {
    "fig-accuracy": 3,  # this run, the LoRA, the base model
    "fig-loss": 4,  # training twice, validation, the LoRA's
    "fig-support": 6 * (len(LAYERS) + 1),
    "fig-policy": 5,
    "fig-training": 2,
}


@pytest.fixture
def tuned_dir(tmp_path: Path) -> Path:
    return write_tuned(tmp_path / "tuned")


def test_the_page_opens_with_every_figure(chromium: Chrome, tuned_dir: Path) -> None:
    open_page(chromium, write_report(tuned_dir))
    assert console_errors(chromium) == []
    assert requests(chromium) == []
    assert {figure: drawn(chromium, figure, LINES) for figure in LINE_FIGURES} == LINE_FIGURES
    for figure in LINE_FIGURES:
        assert len(text(chromium, f"#{figure}-card .caption")) > 40, figure


def test_nothing_speaks_of_bits(chromium: Chrome, tuned_dir: Path) -> None:
    open_page(chromium, write_report(tuned_dir))
    page = text(chromium, "body").lower()
    assert "bits per byte" not in page
    assert "trigram" not in page
    assert "nats per answer token" in page


def test_headline_numbers(chromium: Chrome, tuned_dir: Path) -> None:
    open_page(chromium, write_report(tuned_dir))
    tiles = text(chromium, ".tiles")
    for shown in ("83.0 %", "78.0 to 87.0 %", "+31.0", "+4.0", "988k", "of 135M", "1m 01s"):
        assert shown in tiles
    assert "points; 79.0 %, intervals overlap" in tiles
    assert "softmax: 2.50" in tiles
    moods = {
        tile.find_element(By.CLASS_NAME, "label").text: tile.get_attribute("class")
        for tile in chromium.find_elements(By.CLASS_NAME, "tile")
    }
    assert "good" in str(moods["Against base model"])
    assert "good" not in str(moods["Against lora"])  # the intervals overlap


def test_the_tables_compare_models_and_tasks(chromium: Chrome, tuned_dir: Path) -> None:
    open_page(chromium, write_report(tuned_dir))
    table = text(chromium, "#accuracy")
    assert re.search(r"base model 52\.0 % 47\.0 to 56\.0 % −31\.0", table)
    assert re.search(r"lora 79\.0 % 74\.0 to 83\.0 % −4\.0 0\.3100 43\.2k", table)
    assert re.search(r"this run 83\.0 % 78\.0 to 87\.0 %", table)
    tasks = text(chromium, "#tasks")
    assert re.search(r"<i>sums</i> 53\.0 % .*80\.0 % .*84\.0 % \(78\.0 to 87\.0 %\)", tasks)


def test_layers_show_their_support(chromium: Chrome, tuned_dir: Path) -> None:
    open_page(chromium, write_report(tuned_dir))
    assert re.search(r"Softmax ESS", text(chromium, "#layers"))
    assert LAYERS[0] in text(chromium, "#layers")


def test_plain_lora_has_no_routing_cards(chromium: Chrome, tuned_dir: Path) -> None:
    open_page(chromium, write_report(tuned_dir / "baselines" / "lora"))
    assert console_errors(chromium) == []
    for card in ("#layers", "#fig-support-card", "#fig-policy-card", "#fig-entropy-card"):
        assert not chromium.find_elements(By.CSS_SELECTOR, card)
    assert drawn(chromium, "fig-accuracy", LINES) == 1


def test_a_run_that_is_not_done_shows_its_curves(chromium: Chrome, tuned_dir: Path) -> None:
    (tuned_dir / "summary.json").unlink()
    (tuned_dir / "baselines" / "lora" / "summary.json").unlink()
    (tuned_dir / "status.json").write_text(json.dumps({"state": "failed", "error": "no more"}))
    open_page(chromium, write_report(tuned_dir))
    assert console_errors(chromium) == []
    assert "83.0 %" in text(chromium, ".tiles")  # of the last validation
    assert drawn(chromium, "fig-accuracy", LINES) == 2  # the base is not known yet
    assert "no more" in text(chromium, "#error")


def test_a_deep_model_shows_some_of_its_layers(chromium: Chrome, tmp_path: Path) -> None:
    layers = [f"layers.{i:02d}.mlp.up_proj" for i in range(40)]
    open_page(chromium, write_report(write_tuned(tmp_path / "deep", layers)))
    assert drawn(chromium, "fig-support", LINES) == 6 * (MAX_LAYERS + 1)
    said = text(chromium, "#fig-support-card .caption")
    assert f"Of 40 layers, {MAX_LAYERS} evenly spaced ones are drawn." in said
    shown = thinned(layers)
    assert (shown[0], shown[-1], len(shown)) == (layers[0], layers[-1], MAX_LAYERS)
    assert thinned(layers[:3]) == layers[:3]


def test_the_report_needs_nothing_but_the_run_directory(tuned_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tuned_dir, moved)
    assert write_report(moved).read_text() == write_report(tuned_dir).read_text()
