"""``routerlab certify`` and the page that it writes."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from routerlab.certify import command, page
from routerlab.certify.certificate import CHECKS, Certificate, Result, causality
from routerlab.certify.subject import Subject
from routerlab.core.config import ConfigError, config_dir
from routerlab.routers.token_choice import TokenChoice
from tests.certify import broken

ROOT = Path(__file__).parents[2]


@pytest.fixture
def my_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's directory that CONTRIBUTING.md describes, and one router more."""
    monkeypatch.setattr("routerlab.core.config._user_dirs", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in ("my_routers", "my_leak"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```(?:python|yaml)\n# file: (\S+)\n(.*?)```", text, flags=re.DOTALL)
    for name, content in blocks:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    lab = tmp_path / "my_lab"
    leak = "from tests.certify.broken import LooksAhead as Leak\n"
    (lab / "my_leak.py").write_text(leak)
    (lab / "router" / "leak.yaml").write_text("# It leaks.\n_target_: my_leak.Leak\n")
    return lab


def test_the_router_of_the_text_is_certified(my_lab: Path, capsys: pytest.CaptureFixture) -> None:
    found = my_lab / "found.json"
    words = ["router=margin", "router.margin=0.7", "--config-dir", str(my_lab)]
    assert command.main([*words, "--json", str(found)]) == 0
    shown = capsys.readouterr().out
    assert "margin: pass (causal: yes)" in shown
    (certificate,) = json.loads(found.read_text())
    assert certificate["router"] == "margin"
    assert certificate["passed"] is True
    assert [result["check"] for result in certificate["results"]] == list(CHECKS)


def test_a_leak_is_a_failure(my_lab: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main(["router=leak", f"--config-dir={my_lab}"]) == 1
    shown = capsys.readouterr().out
    assert "leak: FAIL" in shown
    assert "though causal is True" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["router=token_chioce"], r"did you mean 'token_choice'"),
        (["router=token_choice", "router.topk=2"], r"router\.topk.*'router\.top_k'"),
        (["router=token_choice", "router.top_k=9"], r"top_k=9.*8"),
        (["router=token_choice", "data=files"], r"'data=files': certify takes router=NAME"),
        (["token_choice"], r"'token_choice': certify takes router=NAME"),
        (["router.top_k=2"], r"which router\? say router=NAME"),
        (["router=all", "router.top_k=2"], r"router=all.*without knobs"),
        (["router=token_choice", "--write", "x.md"], r"--write.*router=all"),
        (["router=token_choice", "--json", "/no/such/folder/x.json"], r"folder does not exist"),
        (["router=all", "--seconds", "0"], r"--seconds=0\.0: must be above 0"),
        (["router=all", "--config-dir", "/no/such/folder"], r"no such directory"),
    ],
)
def test_bad_input_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        command.main(words)
    assert isinstance(error.value, ConfigError) or "top_k" in message


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2), (["router=x", "--no"], 2)])
def test_options(words: list[str], code: int) -> None:
    assert command.main(words) == code


def test_all_routers_and_their_page(
    my_lab: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(command, "available", lambda group: ["leak", "token_choice"])
    target = my_lab / "routers.md"
    words = ["router=all", "--write", str(target), "--seconds", "0.05", "-cd", str(my_lab)]
    assert command.main(words) == 1
    shown = capsys.readouterr().out
    assert "token_choice: pass" in shown
    assert "leak: FAIL" in shown
    lines = [line for line in target.read_text().splitlines() if line.startswith("| `")]
    cells = {row[0]: row for row in ([c.strip() for c in line[1:-1].split("|")] for line in lines)}
    assert list(cells) == ["`leak`", "`token_choice`"]
    assert cells["`leak`"][1:5] == ["It leaks.", "-", "yes", "-"]
    assert cells["`leak`"][7].startswith("fail: leak: router, eval, leak: router, train, ")
    assert cells["`token_choice`"][7] == "pass"
    for row in cells.values():
        assert 0 < float(row[5]) < 7
        assert float(row[6]) > 0
    assert cells["`token_choice`"][6] == "1.0"


def test_the_page_in_docs_is_of_these_routers() -> None:
    """Names, texts and causality; what was measured depends on the machine."""
    lines = []
    names = {path.stem for path in (config_dir() / "router").glob("[!_]*.yaml")}
    for name in sorted(names - {"native"}):  # which is no router of ours
        blank = Certificate(name, causality(Subject.of(name).router()), [])
        row = page.write_page([page.Entry(blank, None, None)]).splitlines()[-1]
        lines.append(row.split(" | ")[:5])
    text = (ROOT / "docs" / "routers.md").read_text()
    written = [row for row in text.splitlines() if row.startswith("| `")]
    assert [row.split(" | ")[:5] for row in written] == lines, (
        "run: routerlab certify router=all --write docs/routers.md"
    )
    assert all(row.endswith(" | pass |") for row in written)


# -- what is measured -----------------------------------------------------------------------------


class _Fixed(broken.Good):
    """All tokens to experts 0 and 1."""

    def experts(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0, 1]]).expand(len(logits), 2)


class _Even(broken.Good):
    def experts(self, logits: torch.Tensor) -> torch.Tensor:
        first = 2 * torch.arange(len(logits))[:, None] % self.num_experts
        return torch.cat([first, first + 1], dim=1)


@pytest.mark.parametrize(("router", "violation"), [(_Fixed, 16 / 2 - 1), (_Even, 0.0)])
def test_violation(router: type[nn.Module], violation: float) -> None:
    assert page.max_violation(router) == pytest.approx(violation, abs=1e-6)


def test_violation_is_that_of_skewed_tokens() -> None:
    """Plain top-k without any balancing leaves some expert with several times the mean."""
    violation = page.max_violation(TokenChoice)
    assert violation is not None
    assert 1 < violation < 7


def test_violation_is_measured_after_the_routers_own_balancing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page, "STEPS", 30)
    subject = Subject.of("token_choice", ["balancer=expert_bias", "balancer.rate=0.01"])
    plain, balanced = page.max_violation(TokenChoice), page.max_violation(subject.build)
    assert plain is not None
    assert balanced is not None
    assert balanced < plain / 2


def test_a_router_of_other_sizes_is_not_measured() -> None:
    def build(**sizes: int) -> nn.Module:
        raise ValueError("not at this size")

    assert page.max_violation(build) is None
    assert page.relative_costs({"it": build}, 0.01) == {}


def test_a_slower_router_costs_more() -> None:
    class Slow(broken.Good):
        def logits(self, x: torch.Tensor, context: object) -> torch.Tensor:
            return torch.stack([self.gate(x) for _ in range(40)]).mean(0)

    costs = page.relative_costs({"good": broken.Good, "slow": Slow}, 0.1)
    assert costs["slow"] > 2 * costs["good"]


def test_bars_in_a_comment_do_not_end_a_cell() -> None:
    entry = page.Entry(Certificate("a|b", "yes", [Result("record", "pass")]), None, None)
    assert page.write_page([entry]).endswith("| `a\\|b` | - | - | yes | - | - | - | pass |\n")
