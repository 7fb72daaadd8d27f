"""Items: what a row must hold, JSONL files, and splits that share no prompt."""

from pathlib import Path
from typing import Any

import pytest

from routerlab.data.task_items import (
    TaskItem,
    digest,
    make_item,
    mixed,
    read_jsonl,
    split_items,
)


def items(*prompts: str, answer: str = "a") -> list[TaskItem]:
    return [TaskItem(prompt, answer) for prompt in prompts]


def test_rows_become_items() -> None:
    item = make_item({"prompt": "2 + 2 = ", "answer": " 4\n", "task": "sum"}, "line 1")
    assert item == TaskItem("2 + 2 = ", "4")  # white space of a prompt means something
    assert item.where == "line 1"
    chosen = make_item({"prompt": "?", "answer": "b", "options": ["a", " b"]}, "line 2")
    assert chosen.options == ("a", "b")
    assert make_item({"prompt": "?", "answer": "b", "options": None}, "").options == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], r"here: an item is an object with prompt and answer, not \[1\]"),
        ({"answer": "a"}, r"here: has no field 'prompt'; it has \['answer'\]"),
        ({"prompt": "q"}, "here: has no field 'answer'"),
        ({"prompt": 3, "answer": "a"}, "here: prompt=3: must be text"),
        ({"prompt": "q", "answer": None}, "here: answer=None: must be text"),
        ({"prompt": "q", "answer": " \n"}, r"here: answer=' \\n': must not be empty"),
        ({"prompt": "", "answer": "a"}, "here: prompt='': must not be empty"),
        ({"prompt": "\ud800", "answer": "a"}, "here: prompt=.*without lone surrogates"),
        ({"prompt": "q", "answer": "a", "options": "ab"}, "options='ab': must be a list of texts"),
        ({"prompt": "q", "answer": "a", "options": ["a", 1]}, "here: options=1: must be text"),
        ({"prompt": "q", "answer": "a", "options": ["a"]}, "two or more different texts"),
        ({"prompt": "q", "answer": "a", "options": ["a", "a "]}, "two or more different texts"),
        (
            {"prompt": "q", "answer": "c", "options": ["a", "b"]},
            r"here: answer='c': must be one of options=\['a', 'b'\]",
        ),
    ],
)
def test_bad_rows_are_named(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_item(row, "here")


def test_jsonl_lines_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a"}\n\n[2]\n', encoding="utf-8-sig")
    assert list(read_jsonl(path)) == [("mine.jsonl line 1", {"prompt": "a"}),
                                      ("mine.jsonl line 3", [2])]  # fmt: skip
    path.write_text('{"prompt": "a"}\n{"prompt": ')
    with pytest.raises(ValueError, match="mine.jsonl line 2: is not JSON"):
        list(read_jsonl(path))
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="mine.jsonl: cannot be read as UTF-8"):
        list(read_jsonl(path))


def test_splits_by_hand() -> None:
    tasks = {"x": items("p", "q", "r", "s", "t"), "y": items("u", "v", "w")}
    found = split_items(tasks, val_items=1, test_items=1, max_items=2)
    prompts = {
        split: {name: [item.prompt for item in chosen] for name, chosen in tasks.items()}
        for split, tasks in found.items()
    }
    assert prompts == {
        "test": {"x": ["p"], "y": ["u"]},
        "val": {"x": ["q"], "y": ["v"]},
        "train": {"x": ["r", "s"], "y": ["w"]},
    }


def test_no_prompt_is_in_two_splits() -> None:
    # "p" is the same prompt whatever its case and white space, and whatever its task.
    twins = [TaskItem("p", "a"), TaskItem("P ", "b"), TaskItem("p", "a")]
    tasks = {"x": [*twins, *items("q", "r", "s")], "y": items("t", "r", "p", "u")}
    found = split_items(tasks, val_items=1, test_items=1, max_items=None)
    keys = {split: {i.key for chosen in found[split].values() for i in chosen} for split in found}
    assert keys == {"test": {"p", "t"}, "val": {"q", "r"}, "train": {"s", "u"}}
    both = split_items({"x": tasks["x"]}, val_items=1, test_items=2, max_items=None)
    assert both["test"]["x"] == twins[:2]  # two answers to one question; the exact copy is dropped


def test_too_few_items_are_refused() -> None:
    five = {"x": items("p", "q", "r", "s", "s")}
    assert len(split_items(five, val_items=1, test_items=2, max_items=None)["train"]["x"]) == 1
    for val, test in [(2, 2), (1, 4), (1, 3)]:
        with pytest.raises(ValueError, match=f"task 'x': 4 different .* test_items={test}, val_"):
            split_items(five, val_items=val, test_items=test, max_items=None)


def test_the_order_depends_on_prompts_alone() -> None:
    rows = [TaskItem(f"question {n}", str(n)) for n in range(50)]
    order = mixed(rows)
    assert order != rows
    assert mixed(rows[::-1]) == order
    # What a file holds besides does not move an item past another.
    assert mixed(rows[:25]) == [item for item in order if item in rows[:25]]


def test_the_digest_follows_every_text_and_split() -> None:
    first = {"train": items("p", "q"), "val": items("r")}
    assert digest(first) == digest({"val": items("r"), "train": items("p", "q")})
    others = [
        {"train": items("p"), "val": items("q", "r")},
        {"train": items("q", "p"), "val": items("r")},
        {"train": items("p", "q"), "val": items("r", answer="b")},
    ]
    assert len({digest(first), *map(digest, others)}) == 4
