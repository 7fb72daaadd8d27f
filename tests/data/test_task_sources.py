"""Task sources: the real wheel, generators, the user's files, and every refusal."""

import collections
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest

from routerlab.core.download import SourceUnavailable, fetch
from routerlab.data.task_items import TaskItem
from routerlab.data.task_sources import (
    BUILT_IN,
    EVALS,
    GENERATED,
    read_items,
    task_source,
)


@pytest.fixture(scope="module")
def evals_dir() -> Path:
    """Returns a cache that holds the `evals` wheel; skips where pip cannot fetch it."""
    shared = Path(os.environ.get("ROUTERLAB_CACHE", Path.home() / ".cache" / "routerlab"))
    try:
        fetch(EVALS, shared)
    except SourceUnavailable as error:
        pytest.skip(f"built-in tasks: {error}")
    return shared


def read(spec: Any, folder: Path, count: int = 100) -> list[TaskItem]:
    return read_items("mine", task_source("mine", spec), count, folder)


@pytest.mark.parametrize(
    ("name", "size", "answers", "known"),
    [
        ("sarcasm", 28_614, {"no": 14_984, "yes": 13_630}, "hair loss\nIs this headline sarcastic"),
        ("quartz", 3_860, {"A": 1_932, "B": 1_928}, "resistance\nA: increases\nB: decreases\nAns"),
        ("socialiqa", 2_224, {"B": 754, "C": 750, "A": 720}, "B: hate bailey\nC: thank bailey\n"),
        (
            "logiqa",
            1_354,
            {"D": 390, "C": 370, "B": 322, "A": 272},
            "\nC: Li chose to travel by sh",
        ),
        (
            "corr2cause",
            2_246,
            {"contradiction": 1_192, "neutral": 712, "entailment": 342},
            "\nHypothesis: A directly affects B.\nIs it entailment, neutral or contradiction?",
        ),
        ("pararule", 2_000, {"false": 1_034, "true": 966}, "\nTrue or false: Fiona is not big.\n"),
    ],
)
def test_built_in_tasks(
    evals_dir: Path, name: str, size: int, answers: dict[str, int], known: str
) -> None:
    found = read(name, evals_dir)
    assert len(found) == size
    assert collections.Counter(item.answer for item in found) == answers
    assert all(set(item.options) == set(answers) for item in found)
    assert any(known in item.prompt for item in found)
    assert all(item.prompt.endswith("\nAnswer:") for item in found)
    assert found != sorted(found, key=lambda item: int(item.where.split()[1]))  # mixed
    assert not any(re.search(r"^[A-D]: ?([A-D]\.|$)", i.prompt, re.MULTILINE) for i in found)


def test_topics_to_choose_from_are_those_of_the_generated_answers(evals_dir: Path) -> None:
    choosing, generating = read("wiki_topic_choice", evals_dir), read("wiki_topics", evals_dir)
    topics = tuple(sorted({item.answer for item in generating}))
    assert len(topics) == 11
    assert len(choosing) == len(generating) == 8_881
    for with_options, without in zip(choosing, generating, strict=True):
        assert with_options.options == topics
        assert (with_options.prompt, with_options.answer) == (without.prompt, without.answer)
    assert any(item.prompt.endswith(")\nTopic:") for item in choosing)


def test_built_in_tasks_have_the_same_order_every_time(evals_dir: Path) -> None:
    assert read("quartz", evals_dir) == read("quartz", evals_dir)


def test_generated_tasks_are_right(tmp_path: Path) -> None:
    for item in read("addition", tmp_path, 50):
        a, b = map(int, re.findall(r"\d+", item.prompt))
        assert (item.answer, item.options) == (str(a + b), ())
    for item in read("larger", tmp_path, 50):
        assert item.answer == str(max(map(int, item.options)))
    for name in GENERATED:
        assert read(name, tmp_path, 20) == read(name, tmp_path, 50)[:20]  # the same items first


def test_files_and_templates(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a {b}?", "answer": "c"}\n{"prompt": "d", "answer": "e"}')
    assert sorted(i.prompt for i in read(str(path), tmp_path)) == ["a {b}?", "d"]
    found = read({"path": str(path), "template": "Q: {prompt}\nA:"}, tmp_path)
    assert sorted(item.prompt for item in found) == ["Q: a {b}?\nA:", "Q: d\nA:"]
    assert {item.where for item in found} == {"mine.jsonl line 1", "mine.jsonl line 2"}
    assert task_source("mine", str(path)).origin == "mine.jsonl"
    path.write_text('{"prompt": "d", "answer": "e"}\n{"prompt": "d"}')
    with pytest.raises(ValueError, match="task 'mine': mine.jsonl line 2: has no field 'answer'"):
        read(str(path), tmp_path)


def test_reasoning_gym(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    sums = {"name": "reasoning_gym/chain_sum", "options": {"max_terms": 2, "max_digits": 1}}
    found = read(sums, tmp_path, 30)
    assert len(found) == 30
    for item in found:
        a, sign, b = re.findall(r"\d|[+-]", item.prompt)
        assert int(item.answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert item.prompt.endswith("\nAnswer:")
    assert read(sums, tmp_path, 10) == found[:10]
    with pytest.raises(ValueError, match="task 'mine': .*chain_sun is unknown; did you mean 'chai"):
        read("reasoning_gym/chain_sun", tmp_path)
    with pytest.raises(ValueError, match="task 'mine': options={'max_terms': 0}: max_terms must"):
        read({**sums, "options": {"max_terms": 0}}, tmp_path)
    with pytest.raises(ValueError, match="task 'mine': item 1: answer=None: must be text"):
        read("reasoning_gym/rush_hour", tmp_path)


def test_what_reasoning_gym_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, why in [("composite", "has no answer to"), ("word_ladder", "draws other items in")]:
        with pytest.raises(ValueError, match=f"'mine': reasoning_gym/{name} {why}"):
            task_source("mine", f"reasoning_gym/{name}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'mine': .*reasoning-gym; pip install 'routerlab\[tasks"):
        task_source("mine", "reasoning_gym/gcd")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sarcams", r"'sarcams' is neither a built-in task \(sarcasm, .*did you mean 'sarcasm'\?"),
        ("absent.jsonl", "path='absent.jsonl': no such file"),
        ("folder.jsonl", "path='folder.jsonl': is not a .jsonl file"),
        ({"path": "notes.csv"}, "path='notes.csv': is not a .jsonl file"),
        ({}, "a task is a name, a .jsonl file, or a mapping"),
        ({"path": "a.jsonl", "name": "sarcasm"}, "either `path` or `name`"),
        ({"name": "sarcasm", "split": "test"}, "got {'name': 'sarcasm', 'split': 'test'}"),
        ({"name": "sarcasm", "template": "Q:"}, "template='Q:': must contain {prompt}"),
        ({"name": "sarcasm", "options": {"size": 3}}, "options={'size': 3}: only reasoning_gym/"),
    ],
)
def test_refusals_name_the_task(
    spec: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "notes.csv").write_text("a")
    with pytest.raises(ValueError, match=f"^task 'mine': .*{message}"):
        task_source("mine", spec)


def test_no_network_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ValueError, match="task 'mine': pip download evals==3.0.1.post1 failed"):
        read("quartz", tmp_path)


def test_licences_are_told() -> None:
    assert all(task_source("mine", name).licence for name in BUILT_IN)
