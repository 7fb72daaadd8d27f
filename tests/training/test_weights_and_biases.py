"""What a run is at Weights & Biases, read back with the real client; nothing waits or leaks."""

import http.server
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import wandb

from routerlab.core.config import ConfigError
from routerlab.training.heat_map import heat_map
from routerlab.training.loggers import MetricsFiles
from routerlab.training.run_directory import RunDirectory
from routerlab.training.summary import print_headline, sync_command
from routerlab.training.tracking import wandb_mode
from routerlab.training.weights_and_biases import Wandb, capped
from tests.helpers import tracking

SECRETS = {"WANDB_API_KEY": "5ec4e7" * 6 + "beef", "HF_TOKEN": "hf_donottell", "MY_KEY": "donttell"}


@pytest.fixture(scope="module")
def tracked(train: Callable[..., Path]) -> Path:
    """A run of a group that was stopped after step 2 and went on, with secrets around it."""
    words = ("name=tracked", "router=hash", "group=study", "+logger.wandb.tags=[pilot]")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        run = train(*words, "trainer.max_steps=2", logger="logger=[wandb]")
        train(words=[f"resume={run}", "trainer.max_steps=4"])
    return run


@pytest.fixture(scope="module")
def parts(tracked: Path) -> list[tracking.Segment]:
    """What its two processes left behind."""
    return tracking.segments(tracked)


def test_a_run_says_whose_it_is_and_what(tracked: Path, parts: list[tracking.Segment]) -> None:
    first, second = parts
    assert first.run["run_id"] == second.run["run_id"]  # the restart continues it
    for part in parts:
        assert part.run["project"] == "routerlab"
        assert part.run["run_group"] == "study"
        assert part.run["job_type"] == "hash"
        assert part.run["display_name"] == tracked.name
        assert part.config["choices"]["router"] == "hash"
    assert "trainer.max_steps=4" in second.run["tags"]


def test_its_config_is_nested_so_that_it_can_be_filtered(parts: list[tracking.Segment]) -> None:
    config = parts[0].config
    assert config["backbone"]["num_experts"] == 4  # W&B finds it as backbone.num_experts
    assert config["init_from"] is None
    assert not any("." in key for key in config)  # W&B finds no key that holds a dot itself


def test_tags_are_those_of_the_config_and_what_was_overridden(
    parts: list[tracking.Segment],
) -> None:
    tags = parts[0].run["tags"]
    assert {"pilot", "router=hash", "backbone.num_experts=4"} <= set(tags)
    assert len(tags) <= 20
    assert all(1 <= len(tag) <= 64 for tag in tags)
    assert not any("/" in tag for tag in tags)  # no paths
    assert not any(tag.startswith(("group=", "logger", "callback", "trainer.acc")) for tag in tags)


def test_curves_share_the_step_of_the_optimizer(parts: list[tracking.Segment]) -> None:
    rows = [row for part in parts for row in part.history]
    assert all("trainer/global_step" in row for row in rows)
    assert [row["trainer/global_step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["trainer/global_step"] for row in rows if "val/loss" in row] == [2, 4]


def test_the_summary_has_the_best_over_restarts_and_the_headline(
    tracked: Path, parts: list[tracking.Segment]
) -> None:
    losses = [float(row["val/loss"]) for row in MetricsFiles(tracked).rows() if row["val/loss"]]
    files, sent = RunDirectory(tracked).read_json("summary.json"), parts[1].summary
    assert len(losses) == 2
    assert sent["val/loss"] == {"min": min(losses)}
    assert sent["final/bits_per_byte"] == files["val"]["bits_per_byte"]
    assert sent["parameters"] == files["parameters"]
    assert sent["looks_ahead"] == "no"
    assert sent["steps"] == 4
    assert sent["tokens_per_second"] == pytest.approx(files["tokens_per_second"])


def test_the_best_of_a_restart_may_lie_before_it(tmp_path: Path) -> None:
    logger = Wandb(tmp_path)
    logger.log_metrics({"val/loss": 2.0}, 4)  # of the second process
    logger.log_headline({"val": {"loss": 2.0, "by_task": {}}}, {"val/loss": 1.5})
    wandb.finish()
    summary = tracking.segments(tmp_path)[0].summary
    assert summary["val/loss"] == {"min": 1.5}
    assert summary["final/loss"] == 2.0


def test_heat_maps_come_at_validations_only(tracked: Path) -> None:
    images = [path.name for path in tracked.rglob("*.png")]
    assert len([name for name in images if name.startswith("load_by_layer_and_expert")]) == 2
    domains = list(tracked.rglob("expert_by_domain*.png"))
    assert len(domains) == 4  # two layers, two validations
    assert all("/val/router/layers.0" in str(path) for path in domains)


def test_no_secret_of_the_environment_is_in_any_file(tracked: Path) -> None:
    files = [path for path in tracked.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not any(value.encode() in content for value in SECRETS.values()), path


def test_the_printed_command_finds_both_parts(
    tracked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_headline(RunDirectory(tracked))
    lines = [ln for ln in capsys.readouterr().out.splitlines() if "wandb sync" in ln]
    assert lines == [f"upload wandb sync {tracked}/wandb/offline-run-*"]
    command = lines[0].removeprefix("upload wandb sync ")
    listing = subprocess.run(
        f"{shlex.quote(str(tracking.CLIENT))} sync --dry-run {command}",
        shell=True, capture_output=True, text=True, check=True,
    )  # fmt: skip
    text = listing.stdout + listing.stderr
    assert "Would sync 2 run(s)" in text
    assert text.count(".wandb") == 2


def test_the_command_quotes_paths_and_knows_the_runs_inside(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    assert sync_command(tmp_path) is None
    for inside in ("", "baselines/lora"):
        (run / inside / "wandb" / "offline-run-1").mkdir(parents=True)
    assert sync_command(run) == (
        f"wandb sync '{run}/baselines/lora/wandb'/offline-run-* '{run}/wandb'/offline-run-*"
    )


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("logger.wandb.project=a/b", "logger.wandb.project='a/b': must not contain /"),
        (f"logger.wandb.project={129 * 'p'}", "must have 1 to 128 characters"),
        ("logger.wandb.project=''", "logger.wandb.project='': must have 1 to 128 characters"),
        ("logger.wandb.entity=a:b", "logger.wandb.entity='a:b': must not contain :"),
        ("logger.wandb.max_keys=0", "logger.wandb.max_keys=0: must be at least 1"),
        (f"group={129 * 'g'}", "^group='ggg.*must have 1 to 128 characters"),
    ],
)  # fmt: skip
def test_what_w_and_b_would_refuse_is_refused_first(
    train: Callable[..., Path], tmp_path: Path, word: str, named: str
) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=named):
        train(word, f"run_dir={run}", logger="logger=[wandb]")
    assert not run.exists()


# -- modes -----------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets a key and a server's address; W&B's background process forgets them afterwards."""

    def at(address: str) -> None:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
        monkeypatch.setenv("WANDB_BASE_URL", address)
        wandb.teardown()

    yield at
    wandb.teardown()


def test_the_mode_never_leads_to_a_prompt_or_a_wait(
    monkeypatch: pytest.MonkeyPatch, online: Callable[[str], None]
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    assert wandb_mode() == "offline"  # no key
    online("http://127.0.0.1:9")  # a closed port: a key, and no server
    assert wandb_mode() == "offline"  # asked for, and would wait
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_a_key_in_netrc_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password " + "0" * 40)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert wandb_mode() == "online"
    assert wandb_mode() == "offline"  # the server went away


def test_without_a_network_a_run_is_offline_within_seconds(
    tmp_path: Path, online: Callable[[str], None]
) -> None:
    online("http://127.0.0.1:9")
    start = time.monotonic()
    Wandb(tmp_path).log_metrics({"val/loss": 2.0}, 1)
    wandb.finish()
    assert time.monotonic() - start < 10
    assert tracking.segments(tmp_path)[0].summary["val/loss"] == {"min": 2.0}


def test_a_server_that_refuses_the_key_does_not_stop_training(
    tmp_path: Path, online: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(401)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online(f"http://127.0.0.1:{server.server_port}")
        assert wandb_mode() == "online"
        logger = Wandb(tmp_path)
        logger.log_metrics({"val/loss": 2.0}, 1)
        wandb.finish()
        server.shutdown()
    printed = capsys.readouterr().err
    assert "warning: W&B goes on offline: " in printed
    assert "401" in printed
    assert SECRETS["WANDB_API_KEY"] not in printed
    assert tracking.segments(tmp_path)[0].summary["val/loss"] == {"min": 2.0}


def test_disabled_means_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = Wandb(tmp_path)
    logger.log_metrics({"val/loss": 2.0}, 1)
    logger.log_distributions({"val/router/layers.00/expert_load": [0.5, 0.5]}, 1)
    logger.log_headline({"val": {"loss": 2.0}}, {"val/loss": 2.0})
    wandb.finish()
    assert list(tmp_path.rglob("*.wandb")) == []


# -- what is sent ----------------------------------------------------------------------------------


def test_single_layers_go_first_when_there_are_too_many_keys() -> None:
    metrics = {f"router/layers.{i:02d}/load_cv": 0.0 for i in range(12)}
    metrics |= {"router/mean/load_cv": 0.0, "train/loss": 1.0}
    assert capped(metrics, 14) == metrics
    assert set(capped(metrics, 13)) == {"router/mean/load_cv", "train/loss"}


def test_a_heat_map_is_white_at_an_even_share_red_above_it_and_blue_below() -> None:
    pixels = np.asarray(heat_map([[1.0, 1.0], [2.0, 0.0], [4.0, 5.0, 6.0]], []))
    assert pixels.shape == (14 + 3 * 24, 6 + 3 * 24 + 12, 3)

    def cell(row: int, expert: int) -> tuple[int, ...]:
        return tuple(int(value) for value in pixels[14 + 24 * row + 4, 6 + 24 * expert + 4])

    assert cell(0, 0) == cell(0, 1) == cell(2, 1) == (255, 255, 255)
    assert cell(1, 0) == (255, 0, 0)
    assert cell(1, 1) == (0, 0, 255)
    assert cell(2, 2) == (255, 204, 204)  # a fifth more
    assert cell(0, 2) == (190, 190, 190)  # that layer has two experts


def test_names_of_rows_take_room_at_the_left() -> None:
    table = [[0.5, 0.5], [0.1, 0.9]]
    plain, named = heat_map(table, []), heat_map(table, ["layers.00", "layers.01"])
    assert named.height == plain.height
    assert named.width > plain.width + 30
    left = np.asarray(named)[14:, : named.width - plain.width]
    assert (left == 0).any()  # letters
    assert heat_map(table, ["one name for two rows"]).size == plain.size
