"""The saved view shows what our runs log, and reaches the server where there is one."""

import csv
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from routerlab.cli.main import main
from routerlab.core.config import ConfigError
from routerlab.training.tracking import LOAD_MAP, STEP
from tests.helpers import tracking

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces.*")


@pytest.fixture
def view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The definition that is written where there is no key."""
    monkeypatch.chdir(tmp_path)
    assert main(["wandb-view", "me/routers", "--group", "study"]) == 0
    return json.loads((tmp_path / "wandb-view.json").read_text())


def panels(view: dict[str, Any]) -> list[dict[str, Any]]:
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def test_its_curves_are_those_of_our_runs(view: dict[str, Any], finished_run: Path) -> None:
    with (finished_run / "metrics.csv").open(newline="") as file:
        logged = set(next(csv.reader(file)))
    lines = [panel["config"] for panel in panels(view) if "Line Plot" in panel["viewType"]]
    shown = {key for config in lines for key in config["metrics"]}
    assert shown - logged == {"val/accuracy"}  # of runs on tasks
    assert {"val/bits_per_byte", "router/mean/load_entropy", "router/mean/mean_entropy"} <= shown
    assert all(config["xAxis"] == STEP for config in lines)


def test_its_pictures_and_bars_are_those_of_our_runs(
    view: dict[str, Any], finished_run: Path
) -> None:
    summary = tracking.segments(finished_run)[0].summary
    media = [panel for panel in panels(view) if panel["viewType"] == "Media Browser"]
    assert [panel["config"]["mediaKeys"] for panel in media] == [[LOAD_MAP]]
    assert summary[LOAD_MAP]["_type"] == "image-file"
    bars = json.dumps([panel for panel in panels(view) if "Bar" in panel["viewType"]])
    assert "flops_per_token" in bars
    assert "parameters.active" in bars
    assert summary["flops_per_token"] > 0
    assert summary["parameters"]["active"] > 0


def test_it_groups_by_router_and_shows_one_sweep(view: dict[str, Any]) -> None:
    runs = view["spec"]["section"]["runSets"][0]
    assert runs["grouping"] == [{"section": "run", "name": "jobType"}]
    (only,) = runs["filters"]["filters"]
    assert (only["key"]["name"], only["op"], only["value"]) == ("group", "=", "study")
    assert (view["entity"], view["project"]) == ("me", "routers")


def test_without_a_group_it_shows_all(tmp_path: Path) -> None:
    file = tmp_path / "view.json"
    assert main(["wandb-view", "me/routers", "--out", str(file)]) == 0
    runs = json.loads(file.read_text())["spec"]["section"]["runSets"][0]
    assert runs["filters"]["filters"] == []


@pytest.mark.parametrize("project", ["routers", "me/", "/routers", "a/b/c"])
def test_a_wrong_project_is_refused(project: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wandb-view", project]) == 2
    assert "must be ENTITY/PROJECT" in capsys.readouterr().err


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from routerlab.cli import wandb_view

    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ConfigError, match=r"pip install 'routerlab\[wandb-view\]'"):
        wandb_view.workspace("me", "routers", None)


# -- with a server ---------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Answers as the server of W&B does to the two questions that saving a view asks, or refuses
    the key; keeps what it was asked.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuses = False
        self.saved: list[dict[str, Any]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.server.refuses:
            self.send_response(401)
            self.end_headers()
            return
        if b"UpsertView2" in body:
            self.server.saved.append(json.loads(body)["variables"])
        viewer = {"id": "1", "username": "me", "entity": "me", "email": "", "flags": "{}"}
        data = {"viewer": viewer | {"teams": {"edges": []}}}
        data |= {"upsertView": {"view": {"id": "1", "name": "nw-new-v"}, "inserted": True}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def online(server: Server, folder: Path) -> subprocess.CompletedProcess[str]:
    words = ["wandb-view", "me/routers", "--group", "study"]
    return subprocess.run(
        [sys.executable, "-m", "routerlab.cli.main", *words],
        cwd=folder, capture_output=True, text=True, timeout=60,
        env={
            "PATH": "/usr/bin:/bin", "HOME": str(folder), "WANDB_API_KEY": 40 * "a",
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        },
    )  # fmt: skip


def test_online_it_is_saved(server: Server, tmp_path: Path, view: dict[str, Any]) -> None:
    done = online(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"http://127.0.0.1:{server.server_port}/me/routers?nw=new\n"
    (sent,) = server.saved
    assert (sent["entityName"], sent["projectName"]) == ("me", "routers")
    assert _without_ids(json.loads(sent["spec"])) == _without_ids(view["spec"])


def test_a_refused_key_is_said(server: Server, tmp_path: Path) -> None:
    server.refuses = True
    done = online(server, tmp_path)
    assert done.returncode == 2
    assert "error: wandb-view: W&B refused: " in done.stderr
    assert "Traceback" not in done.stderr
    assert 40 * "a" not in done.stdout + done.stderr


def _without_ids(node: Any) -> Any:
    """Without the random names of panels."""
    if isinstance(node, list):
        return [_without_ids(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {key: _without_ids(value) for key, value in node.items() if key != "__id__"}
