"""Fine-tuning batches from tasks: items with a prompt, a right answer and perhaps options."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from routerlab.core.checks import choice
from routerlab.core.download import SourceUnavailable, fetch
from routerlab.data.task_batches import (
    EncodedItem,
    collate,
    encode_items,
    load_tokenizer,
    padding_id,
    tokenizer_identity,
)
from routerlab.data.task_items import SPLITS, TaskItem, digest, split_items
from routerlab.data.task_sources import Spec, read_items, task_source
from routerlab.data.text import StepBatchSampler, even_batches, place

TRAIN_MULTIPLE = 8  # columns of a training batch: few shapes, whole tiles


class ItemDataset(Dataset[EncodedItem]):
    """Gives the encoded items of a split, task after task."""

    def __init__(self, items: Sequence[EncodedItem]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> EncodedItem:
        """Returns one item; the loader's `collate_fn` makes batches of them."""
        return self.items[index]


class TaskDataModule(pl.LightningDataModule):
    """Gives left-padded batches of several tasks (see `task_batches.collate` for their keys).

    Training batches hold right answers only, all tasks mixed in proportion to their sizes, without
    end; validation batches hold every option of their items, or with `val_rows="answer"` the right
    one alone. `batch_size` counts rows, and `val_batch_size` items, of one step over all processes;
    each process has its share. Batches have `choices` where `why_no_choices` is None.
    Use `Trainer(use_distributed_sampler=False)`: the samplers here already divide the work.

    Which items are held out does not depend on `seed`, so that runs of all seeds are tested on the
    same ones; no prompt is in two splits.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, Spec],
        batch_size: int,
        cache_dir: str | Path,
        seed: int,
        tokenizer: Any = None,
        max_length: int = 256,
        truncate_prompts: bool = False,
        val_batch_size: int | None = None,
        max_items: int | None = None,
        val_items: int = 200,
        test_items: int = 500,
        max_val_items: int | None = None,
        final_val_items: int | None = None,
        val_rows: str = "options",
        num_workers: int = 0,
    ) -> None:
        """Checks every value; no item is read yet.

        `tasks` maps a name to a built-in task, `reasoning_gym/NAME`, a .jsonl file whose lines have
        prompt, answer and perhaps options, or a mapping with `name` or `path` and a `template` for
        prompts (`options`: the generator's own). `tokenizer` is one of `transformers`, its path, or
        None: `use_tokenizer` gives it. Of each task, `test_items` are kept for the last evaluation
        of a run, `val_items` for those before it, and at most `max_items` (None: all others) are
        trained on. `max_val_items` and `final_val_items` cut the held-out items of all tasks
        together to as many from each (None: all of them). `val_rows`: a held-out item has a row for
        each of its `options`, or one, with its `answer`; then the first token of every option must
        tell it from the others, in all items.
        """
        super().__init__()
        self.task_names = _checked_names(tasks)
        caps = {"max_val_items": max_val_items, "final_val_items": final_val_items}
        for field, value, least in [
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("max_length", max_length, 3),  # a token each of prompt, answer and end of text
            ("max_items", max_items, 1),
            ("val_items", val_items, 1),
            ("test_items", test_items, 1),
            *((field, value, len(tasks)) for field, value in caps.items()),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ]:
            _check_count(field, value, least)
        choice("val_rows", val_rows, ("options", "answer"))
        self.val_rows = val_rows
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.max_val_items, self.final_val_items = max_val_items, final_val_items
        self.max_length, self.truncate_prompts = max_length, truncate_prompts
        self.seed, self.num_workers = seed, num_workers
        self._sizes = {"val_items": val_items, "test_items": test_items, "max_items": max_items}
        self._cache_dir = Path(cache_dir).expanduser()
        self._sources = {name: task_source(name, spec) for name, spec in tasks.items()}
        endless = [name for name, source in self._sources.items() if source.endless]
        if endless and max_items is None:
            raise ValueError(f"max_items=None: generated tasks have no end, of which {endless} are")
        is_path = isinstance(tokenizer, str | Path)
        self._tokenizer = load_tokenizer(tokenizer) if is_path else tokenizer
        self._own_tokenizer = tokenizer is not None
        self._final = False
        self._splits: dict[str, dict[str, list[TaskItem]]] = {}
        self._encoded: dict[str, list[EncodedItem]] = {}

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Sets the tokenizer, unless this module was made with one; call it before `setup`."""
        if not self._own_tokenizer:
            self._tokenizer, self._encoded = tokenizer, {}

    def prepare_data(self) -> None:
        """Fetches the archives of built-in tasks; Lightning calls it in one process."""
        for name, source in self._sources.items():
            if source.archive is not None:
                try:
                    fetch(source.archive, self._cache_dir)
                except SourceUnavailable as error:
                    raise ValueError(f"task {name!r}: {error}; use a .jsonl file") from error

    def setup(self, stage: str | None = None) -> None:
        """Reads, splits and tokenizes all items, whatever the stage; ValueError for bad ones."""
        if self._encoded:
            return
        if self._tokenizer is None:
            raise RuntimeError("tokenizer: none was given; call use_tokenizer before setup")
        if not self._splits:
            count = sum(size or 0 for size in self._sizes.values())
            items = {
                name: read_items(name, source, count, self._cache_dir)
                for name, source in self._sources.items()
            }
            self._splits = split_items(items, **self._sizes)
        encoded = {split: self._encode(tasks) for split, tasks in self._splits.items()}
        encoded["train"] = [replace(item, sample=i) for i, item in enumerate(encoded["train"])]
        self._encoded = encoded
        if self.val_rows == "answer" and self.why_no_choices is not None:
            raise ValueError(f"val_rows='answer': {self.why_no_choices}; use val_rows='options'")

    @property
    def why_no_choices(self) -> str | None:
        """Returns why batches have no `choices`, naming the first item that is undecided; None
        where they have them: every item chooses, and by the first tokens of its options.
        """
        reasons = (item.undecided for split in SPLITS for item in self._encoded[split])
        return next((reason for reason in reasons if reason is not None), None)

    def use_final_items(self) -> None:
        """From now on the held-out items are those of the last evaluation."""
        self._final = True

    def items(self, split: str) -> dict[str, list[TaskItem]]:
        """Returns the items of "train", "val" or "test" by task; RuntimeError before `setup`."""
        if not self._splits:
            raise RuntimeError("the items are read only after prepare_data() and setup()")
        return self._splits[split]

    @property
    def identity(self) -> dict[str, Any]:
        """Returns what tells one data set from another: tasks, sources, sizes, tokenizer."""
        tasks = {}
        for name, source in self._sources.items():
            splits = {split: self.items(split)[name] for split in SPLITS}
            sizes = {split: len(items) for split, items in splits.items()}
            about = {"source": source.origin, "licence": source.licence}
            tasks[name] = {**about, **sizes, "sha256": digest(splits)}
        lengths = {"max_length": self.max_length, "truncate_prompts": self.truncate_prompts}
        return {"tasks": tasks, "tokenizer": tokenizer_identity(self._tokenizer), **lengths}

    @property
    def vocab_size(self) -> int:
        """Returns the tokenizer's largest id plus one."""
        return tokenizer_identity(self._tokenizer)["vocab_size"]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Returns an endless loader that goes on where the trainer's step count stands."""
        rank, world_size = place(self)
        step = 0 if self.trainer is None else self.trainer.global_step
        items = ItemDataset(self._encoded["train"])
        sampler = StepBatchSampler(len(items), self.batch_size, self.seed, rank, world_size, step)
        batches: DataLoader[Any] = DataLoader(
            items,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self._collate(multiple=TRAIN_MULTIPLE),
        )
        return batches

    def each_train_item(self) -> DataLoader[dict[str, Tensor]]:
        """Returns batches of `batch_size` items to train on, each once, short ones first."""
        items = sorted(self._encoded["train"], key=lambda item: item.length)
        batches: DataLoader[Any] = DataLoader(
            ItemDataset(items), batch_size=self.batch_size, collate_fn=self._collate()
        )
        return batches

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Returns this process's share of the held-out items: each item in exactly one.

        Items are sorted by length, so that little of a batch is padding.
        """
        rank, world_size = place(self)
        held_out = sorted(self._held_out(), key=lambda item: item.length)
        batches: DataLoader[Any] = DataLoader(
            ItemDataset(held_out),
            batch_sampler=even_batches(len(held_out), self.val_batch_size, rank, world_size),
            num_workers=self.num_workers,
            collate_fn=self._collate(val_rows=self.val_rows),
        )
        return batches

    def _collate(self, **form: Any) -> Callable[[Sequence[EncodedItem]], dict[str, Tensor]]:
        choices = self.why_no_choices is None
        return partial(collate, pad=padding_id(self._tokenizer), choices=choices, **form)

    def _held_out(self) -> list[EncodedItem]:
        """Returns the held-out items of this evaluation, task after task."""
        split, most = ("test", self.final_val_items) if self._final else ("val", self.max_val_items)
        items = self._encoded[split]
        if most is None:
            return items
        each = most // len(self.task_names)
        numbers = range(len(self.task_names))
        return [i for task in numbers for i in [i for i in items if i.task == task][:each]]

    def _encode(self, tasks: Mapping[str, Sequence[TaskItem]]) -> list[EncodedItem]:
        limits = self.max_length, self.truncate_prompts
        return [
            item
            for number, (name, items) in enumerate(tasks.items())
            for item in encode_items(items, name, number, self._tokenizer, *limits)
        ]


def _checked_names(tasks: Mapping[str, Spec]) -> list[str]:
    """Returns the names; ValueError unless they can serve as labels and in metric keys."""
    names = list(tasks)
    bad = [
        name
        for name in names
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name == "all"
    ]
    if bad or not names:
        raise ValueError(
            "tasks: names need letters, digits, '_' or '-', and not the word 'all'; "
            f"got {bad or 'no task'}"
        )
    same = [name for name in names if [other.lower() for other in names].count(name.lower()) > 1]
    if same:
        raise ValueError(f"tasks: two of the same name: {same}")
    return names


def _check_count(field: str, value: int | None, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and value >= least):
        raise ValueError(f"{field}={value!r}: must be a whole number of at least {least}")
