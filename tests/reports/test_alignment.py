"""The alignment cards of a report, opened in a real browser."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from routerlab.reports.html import write_report
from tests.reports.test_html import LINES, console_errors, drawn, open_page, requests, text
from tests.reports.tuned import write_tuned


@pytest.fixture
def aligned_dir(tmp_path: Path) -> Path:
    """A run that aligned its routing beside one that was only tuned."""
    run = write_tuned(tmp_path / "aligned")
    for folder, after in ((run, 0.25), (run / "baselines" / "lora", 0.75)):
        about = json.loads((folder / "summary.json").read_text())
        about["alignment"] = {
            "samples": 1234,
            "successful": 567,
            "before": told(0.5, 0.4),
            "after": told(after, 0.6),
        }
        (folder / "summary.json").write_text(json.dumps(about))
    metrics = pd.read_csv(run / "metrics.csv")
    trained = metrics["train/loss"].notna()
    metrics.loc[trained, "loss/manifold_alignment"] = 1 / metrics["step"]
    metrics.loc[trained, "loss/manifold_alignment/weight"] = (metrics["step"] / 12).clip(upper=0.8)
    metrics.to_csv(run / "metrics.csv", index=False)
    return run


def told(distance: float, accuracy: float) -> dict[str, Any]:
    return {
        "distance": distance,
        "similarity": 0.31,
        "load_entropy": 1.25,
        "accuracy": accuracy,
    }


def test_the_cards_show_before_and_after_and_the_curves(
    chromium: Chrome, aligned_dir: Path
) -> None:
    open_page(chromium, write_report(aligned_dir))
    assert console_errors(chromium) == []
    assert requests(chromium) == []
    card = text(chromium, "#alignment")
    assert "lora 0.500 → 0.750 0.310 → 0.310 1.25 → 1.25 0.400 → 0.600" in card
    assert "this run 0.500 → 0.250" in card
    assert "on 1,234 samples, of which 567 were answered rightly before" in card
    # the task's loss of both runs, the alignment's and its weight of one
    assert drawn(chromium, "fig-alignment", LINES) == 4
    assert len(text(chromium, "#fig-alignment-card .caption")) > 40


def test_without_alignment_there_is_no_card(chromium: Chrome, tmp_path: Path) -> None:
    open_page(chromium, write_report(write_tuned(tmp_path / "tuned")))
    for card in ("#alignment", "#fig-alignment-card"):
        assert not chromium.find_elements(By.CSS_SELECTOR, card)


def test_a_run_that_is_not_done_shows_its_curves(chromium: Chrome, aligned_dir: Path) -> None:
    (aligned_dir / "summary.json").unlink()
    (aligned_dir / "baselines" / "lora" / "summary.json").unlink()
    open_page(chromium, write_report(aligned_dir))
    assert console_errors(chromium) == []
    assert not chromium.find_elements(By.CSS_SELECTOR, "#alignment")
    assert drawn(chromium, "fig-alignment", LINES) == 4
