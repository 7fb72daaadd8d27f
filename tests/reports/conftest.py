"""A run directory with made-up numbers, and a real headless Chromium."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1000",
]
LAYERS = [f"layers.{i:02d}" for i in range(4)]
DOMAINS = ["wiki", "code", "<b>stories</b>"]
EXPERTS, TOP_K, STEPS = 8, 2, 300


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver_path is None:
        pytest.skip("needs chromium and chromedriver on the PATH (Debian: apt install both)")
    options = Options()
    options.binary_location = browser
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    yield driver
    driver.quit()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def write_run(path: Path) -> Path:
    """A finished run of four layers whose last layer loses expert 7."""
    path.mkdir()
    rng = np.random.default_rng(0)
    loads = _loads(rng)
    (path / "config.yaml").write_text("seed: 1\nname: <script>alert('x')</script>\n")
    (path / "overrides.yaml").write_text("- router=top_k\n- router.top_k=2\n")
    environment = {"commit": "abc123", "versions": {"torch": "2.13"}, "hardware": {"cpu": "x & y"}}
    (path / "environment.json").write_text(json.dumps(environment))
    (path / "status.json").write_text(json.dumps({"state": "done", "error": None}))
    (path / "summary.json").write_text(json.dumps(_summary()))
    _write_metrics(path / "metrics.csv", rng)
    records = [
        {"step": step, "name": f"router/{layer}/expert_load", "value": loads[layer][step].tolist()}
        for step in range(0, STEPS, 3)
        for layer in LAYERS
    ] + [
        {
            "step": step,
            "name": f"val/router/{layer}/expert_by_domain",
            "value": (TOP_K * rng.dirichlet(np.full(EXPERTS, 4.0), len(DOMAINS))).tolist(),
        }
        for step in (150, 299)
        for layer in LAYERS
    ]
    (path / "distributions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def _loads(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Expert shares [steps, E] a layer: a slow random walk; expert 7 of the last layer dies."""
    loads = {}
    for layer in LAYERS:
        walk = rng.normal(0, 0.03, (STEPS, EXPERTS)).cumsum(axis=0)
        if layer == LAYERS[-1]:
            walk[:, 7] -= np.linspace(0, 6, STEPS)
        loads[layer] = np.exp(walk) / np.exp(walk).sum(axis=1, keepdims=True)
    return loads


def _summary() -> dict[str, Any]:
    row = {"load_entropy": 0.9712, "max_violation": 0.3141, "mean_entropy": 0.6123}
    row |= {"entropy_of_mean": 0.9534, "mutual_information": 0.3411}
    return {
        "name": "quickstart top_k",
        "steps": STEPS,
        "tokens": 1_228_800,
        "train_seconds": 93.4,
        "tokens_per_second": 13156.2,
        "parameters": {"total": 2_345_678, "active": 987_654, "experts": 4 * EXPERTS},
        "val": {
            "loss": 1.834,
            "bits_per_byte": 2.312,
            "bits_per_byte_by_domain": dict(zip(DOMAINS, (2.41, 1.93, 2.6), strict=True)),
        },
        "baselines": {"unigram": 4.731, "bigram": 3.652, "trigram": 2.987},
        "domains": DOMAINS,
        "top_k": TOP_K,
        "num_experts": [EXPERTS] * 4,
        "layers": [{"layer": x, "dead_experts": int(x == LAYERS[-1])} | row for x in LAYERS],
    }


def _write_metrics(path: Path, rng: np.random.Generator) -> None:
    rows = [_train_row(step, rng) for step in range(STEPS)]
    rows += [_val_row(step) for step in (0, 75, 150, 225, 299)]
    rows.sort(key=lambda row: row["step"])
    keys = dict.fromkeys(["step", *(key for row in rows for key in row)])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(keys))
        writer.writeheader()
        writer.writerows(rows)


def _bits(step: int) -> float:
    return 2.2 + 4.2 * np.exp(-step / 45)


def _train_row(step: int, rng: np.random.Generator) -> dict[str, Any]:
    bits = _bits(step) + rng.normal(0, 0.12)
    row: dict[str, Any] = {"step": step, "train/loss": bits * 0.8, "train/bits_per_byte": bits}
    row |= {"train/learning_rate": 1e-3 * min(1, step / 30) * (1 - step / 400)}
    row |= {"train/grad_norm": 1 + rng.exponential(0.3)}
    row |= {"train/tokens_per_second": 13000 + rng.normal(0, 300)}
    balance = 1 + 0.6 * np.exp(-step / 60) + rng.normal(0, 0.01)
    row |= {"loss/load_balancing": balance, "loss/load_balancing/weighted": 0.01 * balance}
    z_loss = 4 + step / 100 + rng.normal(0, 0.1)
    row |= {"loss/router_z": z_loss, "loss/router_z/weighted": 0.001 * z_loss}
    return row | _router_row(step, rng, "router")


def _router_row(step: int, rng: np.random.Generator, prefix: str) -> dict[str, Any]:
    done = 1 - np.exp(-step / 80)
    row: dict[str, float] = {}
    for depth, layer in enumerate(LAYERS):
        token, mean = 0.99 - (0.3 + 0.05 * depth) * done, 0.99 - 0.03 * done
        values = {"load_entropy": 0.9 + 0.08 * done - 0.01 * depth, "mean_entropy": token}
        values |= {"entropy_of_mean": mean, "mutual_information": mean - token}
        values |= {"max_violation": 1.1 - 0.7 * done, "dead_experts": int(depth == 3)}
        values |= {"boundary_margin": 0.02 + 0.1 * done, "logit_norm": 2 + 3 * done + depth}
        noisy = {name: value + rng.normal(0, 0.004) for name, value in values.items()}
        noisy["mutual_information"] = noisy["entropy_of_mean"] - noisy["mean_entropy"]
        noisy |= {"dead_experts": values["dead_experts"], "dropped_share": 0.0}
        row |= {f"{prefix}/{layer}/{name}": value for name, value in noisy.items()}
    names = {key.rsplit("/", 1)[1] for key in row}
    for name in sorted(names):
        row[f"{prefix}/mean/{name}"] = float(
            np.mean([row[f"{prefix}/{layer}/{name}"] for layer in LAYERS])
        )
    return row


def _val_row(step: int) -> dict[str, Any]:
    bits = _bits(step) + 0.1
    row: dict[str, Any] = {"step": step, "val/loss": bits * 0.8, "val/bits_per_byte": bits}
    row |= {f"val/bits_per_byte/{domain}": bits + 0.1 for domain in DOMAINS}
    return row | _router_row(step, np.random.default_rng(step), "val/router")
