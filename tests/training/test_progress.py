"""What a training run prints where there is no terminal."""

from collections.abc import Callable
from pathlib import Path

import pytest


def test_a_log_gets_lines_whatever_the_environment_says_of_colours(
    train: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as notebooks and build servers do
    train("name=log")
    lines = capsys.readouterr().out.splitlines()
    assert any("step 4/4" in line for line in lines)
    assert any("validation" in line for line in lines)
    assert len(lines) < 10  # no line a refresh
