"""Where numbers go."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from routerlab.training.loggers import MetricsFiles, Wandb, capped, heat_map, wandb_mode


def test_a_new_scalar_adds_a_column_and_keeps_what_was_there(tmp_path: Path) -> None:
    files = MetricsFiles(tmp_path)
    files.log_metrics({"train/loss": 0.1 + 0.2}, 1)
    files.log_metrics({"val/loss": 2.0}, 1)
    files.log_metrics({"train/loss": 1.5, "val/loss": 1.0}, 2)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert rows == [
        {"step": "1", "train/loss": "0.30000000000000004", "val/loss": ""},  # all digits are kept
        {"step": "1", "train/loss": "", "val/loss": "2.0"},
        {"step": "2", "train/loss": "1.5", "val/loss": "1.0"},
    ]
    assert files.has(1, "val/loss")
    assert not files.has(3, "val/loss")


def test_rewind_forgets_later_steps_and_torn_lines(tmp_path: Path) -> None:
    files = MetricsFiles(tmp_path)
    for step in (1, 2, 3):
        files.log_metrics({"a": float(step)}, step)
        files.log_distributions({"load": [0.5, 0.5]}, step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,1")  # a number cut short looks like a number
    with (tmp_path / "distributions.jsonl").open("a") as file:
        file.write('{"step": 2, "na')
    again = MetricsFiles(tmp_path)  # as a resumed process sees it
    again.rewind(2)
    again.log_metrics({"a": 9.0}, 3)
    assert [row["a"] for row in again.rows()] == ["1.0", "2.0", "9.0"]
    lines = (tmp_path / "distributions.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_single_layers_go_first_when_there_are_too_many_keys() -> None:
    metrics = {f"router/layers.{i:02d}/load_cv": 0.0 for i in range(12)}
    metrics |= {"router/mean/load_cv": 0.0, "train/loss": 1.0}
    assert capped(metrics, 14) == metrics
    assert set(capped(metrics, 13)) == {"router/mean/load_cv", "train/loss"}


def test_the_mode_never_leads_to_a_prompt_or_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    assert wandb_mode() == "offline"  # no key
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # a closed port
    assert wandb_mode() == "offline"  # a key, and no server
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_mode() == "offline"  # asked for, and would wait
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_a_key_in_netrc_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password " + "0" * 40)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert wandb_mode() == "online"
    assert wandb_mode() == "offline"  # the server went away


def test_max_keys_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_keys=0"):
        Wandb(tmp_path, max_keys=0)


def test_an_offline_run_holds_scalars_histograms_and_heat_maps(finished_run: Path) -> None:
    folder = next((finished_run / "wandb").glob("offline-run-*"))
    program = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [program, "leet", "inspect", "--json", folder], capture_output=True, text=True, check=True
    )
    for key in ("train/loss", "val/bits_per_byte", "router/mean/max_violation", "loss/router_z"):
        assert key in done.stdout
    assert '"histogram"' in done.stdout or "histogram" in done.stdout
    images = [p.name for p in folder.rglob("*.png")]
    assert any("load_by_layer_and_expert" in name for name in images)
    assert any("expert_by_domain" in name for name in images)


def test_a_heat_map_is_white_at_an_even_share_and_red_above_it() -> None:
    pixels = np.asarray(heat_map(np.array([[1.0, 1.0], [2.0, 0.0]])))
    assert pixels.shape == (48, 48, 3)
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    red, green, blue = pixels[47, 0]
    assert (red, green, blue) == (255, 0, 0)
    assert tuple(pixels[47, 47]) == (0, 0, 255)
