"""What CONTRIBUTING.md says works: its files are written and trained with."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_the_router_of_the_text_trains_two_steps(
    tiny_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```(?:python|yaml)\n# file: (\S+)\n(.*?)```", text, flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["my_lab/my_routers.py", "my_lab/router/margin.yaml"]
    for name, content in blocks:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    command = re.search(r"routerlab (train --config-dir my_lab .*)", text)
    assert command
    words = command[1].replace("experiment=quickstart", "").split()
    run = tmp_path / "run"
    program = [sys.executable, "-m", "routerlab.cli.main", *words]
    more = tiny_words("trainer.max_steps=2", f"run_dir={run}")
    subprocess.run([*program, *more], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    router = yaml.safe_load((run / "config.yaml").read_text())["router"]
    assert router == {"_target_": "my_routers.MarginRouter", "margin": 0.7}
    listing = [sys.executable, "-m", "routerlab.cli.main", "routers", "--config-dir", "my_lab"]
    listed = subprocess.run(listing, cwd=tmp_path, check=True, capture_output=True, text=True)
    lines = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
    assert ["margin", "Every token picks the experts near its best one."] in lines
    certify = [sys.executable, "-m", "routerlab.cli.main", "certify", "--config-dir", "my_lab"]
    certified = subprocess.run([*certify, "router=margin"], cwd=tmp_path, capture_output=True)
    assert certified.returncode == 0, certified.stdout.decode()
