"""Items of a task (prompt, answer, perhaps options): their checks, JSONL files, and splits."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLITS = ("test", "val", "train")


@dataclass(frozen=True)
class TaskItem:
    """One question of a task and its right answer.

    With `options`, of which `answer` is one, it is multiple choice; without, the answer is
    generated. `where` says in messages where the item comes from.
    """

    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    where: str = field(default="", compare=False)

    @property
    def key(self) -> str:
        """Returns what decides on the split: the prompt, whatever its case and white space."""
        return " ".join(self.prompt.split()).casefold()


def make_item(row: Any, where: str) -> TaskItem:
    """Returns the item of a row {prompt, answer, options?}; other keys of the row are ignored.

    Answers and options lose the white space around them. Raises ValueError, beginning with
    `where`, for a row that is no item.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: an item is an object with prompt and answer, not {row!r}")
    for name in ("prompt", "answer"):
        if name not in row:
            raise ValueError(f"{where}: has no field {name!r}; it has {sorted(map(str, row))}")
    prompt, answer = _text(row["prompt"], "prompt", where), _text(row["answer"], "answer", where)
    answer, options = answer.strip(), row.get("options")
    if options is None:
        return TaskItem(prompt, answer, where=where)
    if not isinstance(options, list | tuple):
        raise ValueError(f"{where}: options={options!r}: must be a list of texts")
    options = tuple(_text(option, "options", where).strip() for option in options)
    if len(options) < 2 or len(set(options)) < len(options):
        raise ValueError(f"{where}: options={list(options)}: must be two or more different texts")
    if answer not in options:
        raise ValueError(f"{where}: answer={answer!r}: must be one of options={list(options)}")
    return TaskItem(prompt, answer, options, where)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name}={value!r}: must be text")
    if not value.strip():
        raise ValueError(f"{where}: {name}={value!r}: must not be empty")
    if value.encode("utf-8", "ignore").decode() != value:
        raise ValueError(f"{where}: {name}={value!r}: must be Unicode, without lone surrogates")
    return value


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (line's place, row) of a file with one JSON object a line; blank lines are skipped.

    Raises ValueError, with the line, for what is not UTF-8 or not JSON.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path.name} line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} line {number}: is not JSON: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8: {error}") from error


def mixed(items: Sequence[TaskItem]) -> list[TaskItem]:
    """Returns the items in an order that depends on their prompts alone."""
    return sorted(items, key=lambda item: hashlib.sha256(item.key.encode()).digest())


def split_items(
    tasks: Mapping[str, Sequence[TaskItem]],
    *,
    val_items: int,
    test_items: int,
    max_items: int | None,
) -> dict[str, dict[str, list[TaskItem]]]:
    """Returns {split: {task: items}}: of each task the first items are test, then val, then train.

    A prompt is in one split only, over all tasks: a split takes no item whose prompt is in an
    earlier one. Exact copies of an item are used once. Raises ValueError, naming the task, if
    there are not `test_items` and `val_items` items and at least one (at most `max_items`) to
    train on.
    """
    found: dict[str, dict[str, list[TaskItem]]] = {}
    taken: set[str] = set()
    for split, size in zip(SPLITS, (test_items, val_items, max_items), strict=True):
        found[split] = {}
        for name, items in tasks.items():
            free = [item for item in dict.fromkeys(items) if item.key not in taken][:size]
            if len(free) < (1 if split == "train" else size or 0):
                prompts = len({item.key for item in items})
                raise ValueError(
                    f"task {name!r}: {prompts} different prompts are too few for "
                    f"test_items={test_items}, val_items={val_items} and one to train on"
                )
            found[split][name] = free
        taken |= {item.key for items in found[split].values() for item in items}
    return found


def digest(splits: Mapping[str, Sequence[TaskItem]]) -> str:
    """Returns 16 hex digits that change with any text of the items, their order and split."""
    parts = {
        split: [(item.prompt, item.answer, item.options) for item in items]
        for split, items in splits.items()
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
