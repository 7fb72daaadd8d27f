"""The data module of tasks, with and without a trainer."""

import itertools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from routerlab.core.config import compose
from routerlab.core.instantiate import build
from routerlab.data.task_sources import EVALS
from routerlab.data.tasks import TaskDataModule
from tests.helpers.language_models import save_tiny, tiny_tokenizer


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """Returns a file of 100 items with 100 prompts of different lengths."""
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{'please ' * (n % 5)}{n}+1=", "answer": str(n + 1)} for n in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def module(sums: Path, ready: bool = True, **changes: Any) -> TaskDataModule:
    options = {
        "tasks": {"sums": str(sums), "larger": "larger"},
        "batch_size": 6,
        "cache_dir": sums.parent / "cache",
        "seed": 3,
        "tokenizer": tiny_tokenizer(),
        "val_batch_size": 4,
        "val_items": 10,
        "test_items": 20,
        "max_items": 50,
    }
    data = TaskDataModule(**(options | changes))
    if ready:
        data.prepare_data()
        data.setup()
    return data


def held_out(data: TaskDataModule) -> list[tuple[Any, ...]]:
    """Returns (task, gold, tokens..) of every row, whatever the padding."""
    return [
        (int(task), bool(gold), *ids[valid].tolist())
        for batch in data.val_dataloader()
        for ids, valid, task, gold in zip(
            batch["input_ids"], batch["valid"], batch["task"], batch["gold"], strict=True
        )
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {}}, "tasks: names .* got no task"),
        ({"tasks": {"a b": "larger"}}, r"tasks: names need letters.* got \['a b'\]"),
        ({"tasks": {"all": "larger"}}, "not the word 'all'"),
        ({"tasks": {"a": "larger", "A": "larger"}}, r"tasks: two of the same name: \['a', 'A'\]"),
        ({"tasks": {"a": "larges"}}, "task 'a': 'larges' .*did you mean 'larger'"),
        ({"batch_size": 0}, "batch_size=0: must be a whole number of at least 1"),
        ({"batch_size": True}, "batch_size=True"),
        ({"val_batch_size": 0}, "val_batch_size=0"),
        ({"max_length": 2}, "max_length=2: must be a whole number of at least 3"),
        ({"max_items": 0}, "max_items=0"),
        ({"max_items": None}, r"max_items=None: generated tasks have no end, .*\['larger'\]"),
        ({"val_items": 0}, "val_items=0"),
        ({"test_items": 0}, "test_items=0"),
        ({"max_val_items": 1}, "max_val_items=1: must be a whole number of at least 2"),
        ({"final_val_items": 1}, "final_val_items=1: must be a whole number of at least 2"),
        ({"seed": -1}, "seed=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"val_rows": "all"}, "val_rows='all': must be one of 'options', 'answer'"),
        ({"tokenizer": "no/such/folder"}, "tokenizer='no/such/folder': cannot be loaded"),
    ],
)
def test_refusals(sums: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(sums, ready=False, **changes)


def test_refusals_on_reading(sums: Path) -> None:
    with pytest.raises(ValueError, match="task 'sums': 100 different prompts .* test_items=95"):
        module(sums, test_items=95)
    with pytest.raises(ValueError, match="task 'sums': sums.jsonl line .* over max_length=30"):
        module(sums, max_length=30)
    data = module(sums, ready=False, tokenizer=None)
    with pytest.raises(RuntimeError, match="tokenizer: none was given; call use_tokenizer"):
        data.setup()
    with pytest.raises(RuntimeError, match="only after prepare_data"):
        data.items("train")
    with pytest.raises(ValueError, match="val_rows='answer': task 'sums': .* is generated, not"):
        module(sums, val_rows="answer")


def test_splits_are_disjoint_and_the_same_for_every_seed(sums: Path) -> None:
    data = module(sums)
    sizes = {split: [len(items) for items in data.items(split).values()] for split in
             ("train", "val", "test")}  # fmt: skip
    assert sizes == {"train": [50, 50], "val": [10, 10], "test": [20, 20]}
    prompts = [item.key for split in sizes for items in data.items(split).values()
               for item in items]  # fmt: skip
    assert len(set(prompts)) == len(prompts) == 160
    assert module(sums, seed=4).items("test") == data.items("test")
    assert module(sums, max_items=5).items("test") == data.items("test")


def test_training_batches(sums: Path) -> None:
    data = module(sums)
    assert data.task_names == ["sums", "larger"]
    first, second = itertools.islice(data.train_dataloader(), 2)
    keys = {"input_ids", "labels", "valid", "prompt", "task", "domain", "sample"}
    assert set(first) == keys  # and no choices: sums are generated
    assert first["input_ids"].shape[0] == 6
    assert first["input_ids"].shape[1] % 8 == 0
    assert not all(torch.equal(first[key], second[key]) for key in first)
    again = next(iter(data.train_dataloader()))
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = next(iter(module(sums, seed=4).train_dataloader()))
    assert not torch.equal(other["task"], first["task"])
    # An epoch has every item once, and a row its right answer.
    epoch = list(itertools.islice(module(sums, batch_size=10).train_dataloader(), 10))
    assert torch.cat([batch["task"] for batch in epoch]).bincount().tolist() == [50, 50]
    decode = tiny_tokenizer().decode
    wanted = {
        f"{item.prompt} {item.answer}" for items in data.items("train").values() for item in items
    }
    rows = [
        decode(ids[valid]).removesuffix("<|endoftext|>")
        for batch in epoch
        for ids, valid in zip(batch["input_ids"], batch["valid"], strict=True)
    ]
    assert {row.lower() for row in wanted} == set(rows)


def test_items_to_train_on_have_numbers(sums: Path) -> None:
    data = module(sums)
    prompts = [item.prompt for items in data.items("train").values() for item in items]
    batches = list(data.each_train_item())
    assert sorted(torch.cat([batch["sample"] for batch in batches]).tolist()) == [*range(100)]
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert lengths == sorted(lengths)
    drawn = next(iter(data.train_dataloader()))
    for batch in (drawn, *batches):
        for ids, prompt, number in zip(
            batch["input_ids"], batch["prompt"], batch["sample"].tolist(), strict=True
        ):
            assert tiny_tokenizer().decode(ids[prompt]) == prompts[number].lower()
    held = torch.cat([batch["sample"] for batch in data.val_dataloader()])
    assert (held == -1).all()


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Returns a file of 40 items with two or three options that their first letters tell apart."""
    path = tmp_path / "letters.jsonl"
    options = [["abc", "b"], ["a", "bcd", "c"]]
    rows = [{"prompt": f"{n}? ", "answer": options[n % 2][n % 3 % 2], "options": options[n % 2]}
            for n in range(40)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_right_answers_alone_are_enough_where_first_tokens_decide(letters: Path) -> None:
    options = {"tasks": {"letters": str(letters)}, "val_items": 9, "test_items": 10}
    every, right = module(letters, **options), module(letters, **options, val_rows="answer")
    assert every.why_no_choices is None
    assert len(held_out(right)) == 9 < len(held_out(every))
    assert sorted(row for row in held_out(every) if row[1]) == sorted(held_out(right))
    for batch in [*right.val_dataloader(), next(iter(right.train_dataloader()))]:
        first = batch["labels"].gather(1, (batch["labels"] != -100).int().argmax(1)[:, None])
        assert (batch["choices"] == first).sum(1).eq(1).all()
    assert right.identity == every.identity  # the same data, looked at in another way


def test_validation_batches(sums: Path) -> None:
    data = module(sums)
    batches = list(data.val_dataloader())
    assert [int(batch["item"].max()) + 1 for batch in batches] == [4] * 5
    rows = held_out(data)
    assert len(rows) == 10 + 2 * 10
    assert [task for task, gold, *_ in rows if gold].count(0) == 10
    for batch in batches:
        assert torch.equal(batch["chooses"], batch["task"] == 1)
        assert batch["gold"].sum() == batch["item"].unique().numel()
        assert batch["valid"].any(0).all()  # no wider than the longest row
    lengths = [int(batch["valid"].sum(1).max()) for batch in batches]
    assert lengths == sorted(lengths)


def test_the_last_evaluation_has_other_items(sums: Path) -> None:
    data = module(sums, max_val_items=8, final_val_items=30)
    during = held_out(data)
    assert [task for task, gold, *_ in during if gold] .count(0) == 4  # fmt: skip
    data.use_final_items()
    final = held_out(data)
    assert sum(gold for _, gold, *_ in final) == 30
    assert not set(during) & set(final)


class _Place:
    """Stands for a trainer of two processes."""

    global_step, world_size = 4, 2

    def __init__(self, rank: int) -> None:
        self.global_rank = rank


def test_ranks_share_the_work(sums: Path) -> None:
    data = module(sums, val_items=9)
    whole, alone = list(itertools.islice(data.train_dataloader(), 5)), held_out(data)
    parts, shares = [], []
    for rank in range(2):
        data.trainer = _Place(rank)  # type: ignore[assignment]
        parts.append(next(iter(data.train_dataloader())))
        shares.append(held_out(data))
    assert sorted(shares[0] + shares[1]) == sorted(alone)
    assert torch.equal(torch.cat([part["task"] for part in parts]), whole[4]["task"])
    labels = [row[row != -100].tolist() for part in parts for row in part["labels"]]
    assert labels == [row[row != -100].tolist() for row in whole[4]["labels"]]


def test_the_tokenizer_may_come_later_or_from_a_folder(sums: Path, tmp_path: Path) -> None:
    given = module(sums)
    late = module(sums, ready=False, tokenizer=None)
    late.use_tokenizer(tiny_tokenizer())
    late.setup()
    folder = module(sums, tokenizer=save_tiny(tmp_path / "model"))
    assert given.identity == late.identity == folder.identity
    assert given.vocab_size == len(tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["larger"])
    given.use_tokenizer(other)  # its own stays
    assert given.identity == late.identity
    late.use_tokenizer(other)
    late.setup()
    assert late.vocab_size == given.vocab_size + 1
    assert late.identity["tokenizer"] != given.identity["tokenizer"]


def test_the_identity_tells_data_apart_and_is_plain(sums: Path) -> None:
    identity = module(sums).identity
    assert json.loads(json.dumps(identity)) == identity
    assert identity["tasks"]["sums"].items() >= {
        "source": "sums.jsonl", "train": 50, "val": 10, "test": 20,
    }.items()  # fmt: skip
    assert module(sums, seed=9).identity == identity
    assert module(sums, max_items=49).identity != identity
    sums.write_text(sums.read_text().replace("please", "kindly"))
    assert module(sums).identity != identity


class _Recorder(pl.LightningModule):
    """Keeps the inputs it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"])
        return self.weight * batch["labels"].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(data: TaskDataModule, steps: int, folder: Path, resume: Path | None) -> list[Tensor]:
    recorder = _Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, use_distributed_sampler=False,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(recorder, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return recorder.seen


def test_a_resumed_run_sees_the_rest_of_the_data(sums: Path, tmp_path: Path) -> None:
    whole = train(module(sums), 8, tmp_path, None)
    begun = train(module(sums), 5, tmp_path, None)
    resumed = train(module(sums), 8, tmp_path, tmp_path / "last.ckpt")
    assert len(whole) == len(begun + resumed) == 8
    assert all(torch.equal(a, b) for a, b in zip(whole, begun + resumed, strict=True))


def test_configs_build(sums: Path) -> None:
    configs = Path(__file__).parents[2] / "configs" / "data"
    found = {path.stem for path in configs.glob("*.yaml") if "_tasks" in path.read_text()}
    assert found >= {
        "sarcasm", "quartz", "wiki_topics", "choices", "skills", "reasoning", "jsonl",
    }  # fmt: skip
    for name in ("sarcasm", "quartz"):
        data = build(compose(f"data={name}").data)
        assert data.task_names == [name]
        assert data._sources[name].archive is EVALS
    words = ["data=jsonl", f"data.tasks={{mine: {{path: {sums}, template: 'Q {{prompt}}'}}}}"]
    data = build(compose(*words).data, tokenizer=tiny_tokenizer(), test_items=20)
    data.setup()
    assert all(item.prompt.startswith("Q ") for item in data.items("val")["mine"])


def test_config_of_generators_builds() -> None:
    pytest.importorskip("reasoning_gym")
    data = build(
        compose("data=reasoning").data, max_items=3, val_items=2, test_items=2, max_length=512
    )
    data.use_tokenizer(tiny_tokenizer())
    data.setup()
    assert [len(items) for items in data.items("train").values()] == [3] * 5
