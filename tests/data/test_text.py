"""Windows, the order of batches, and the data module with and without a trainer."""

import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from routerlab.data.text import (
    StepBatchSampler,
    TextDataModule,
    WindowDataset,
    even_batches,
)


def test_windows_by_hand() -> None:
    # 10 and 8 tokens, windows of 3: tokens 0..3, 3..6, 6..9 | 0..3, 3..6; one token is left over.
    first = np.arange(10, dtype=np.uint16)
    second = np.arange(100, 108, dtype=np.uint32)
    windows = WindowDataset([first, second], seq_len=3)
    assert len(windows) == 5
    found = [(w["input_ids"].tolist(), w["labels"].tolist(), int(w["domain"])) for w in
             (windows[i] for i in range(5))]  # fmt: skip
    assert found == [
        ([0, 1, 2], [1, 2, 3], 0),
        ([3, 4, 5], [4, 5, 6], 0),
        ([6, 7, 8], [7, 8, 9], 0),
        ([100, 101, 102], [101, 102, 103], 1),
        ([103, 104, 105], [104, 105, 106], 1),
    ]
    assert all(value.dtype == torch.int64 for value in windows[4].values())
    assert windows[4]["domain"].shape == ()
    with pytest.raises(IndexError):
        windows[5]


def test_too_short_a_domain_is_named() -> None:
    tokens = [np.zeros(4, np.uint16), np.zeros(3, np.uint16)]
    assert len(WindowDataset(tokens, 2)) == 2
    with pytest.raises(ValueError, match="at least 4 tokens .* domain 'b' has one of 3"):
        WindowDataset(tokens, 3, ["a", "b"])


def test_evenly_spaced_windows() -> None:
    windows = WindowDataset([np.zeros(11, np.uint16), np.zeros(7, np.uint16)], 1)
    # Windows 0..9 and 10..15; five allowed, so two of each domain: 0, 5 and 10, 13.
    assert windows.evenly_spaced(5) == [0, 5, 10, 13]
    assert windows.evenly_spaced(1000) == [0, 1, 3, 5, 6, 8, 10, 11, 12, 13, 14, 15]
    assert windows.evenly_spaced(None) == list(range(16))
    with pytest.raises(ValueError, match="max_val_windows: 1 is less than one for each of 2"):
        windows.evenly_spaced(1)


def test_a_batch_depends_on_nothing_drawn_before() -> None:
    sampler = StepBatchSampler(10, 4, seed=1)
    ahead = [sampler.batch(step) for step in (50, 3, 17, 0)]
    assert ahead == [StepBatchSampler(10, 4, seed=1).batch(step) for step in (50, 3, 17, 0)]
    assert ahead == [sampler.batch(step) for step in (50, 3, 17, 0)]
    assert StepBatchSampler(10, 4, seed=2).batch(0) != ahead[3]


def test_continuation_is_the_tail_of_an_uninterrupted_stream() -> None:
    whole = list(itertools.islice(StepBatchSampler(23, 8, seed=5), 40))
    for start in (1, 7, 30):
        rest = itertools.islice(StepBatchSampler(23, 8, seed=5, start_step=start), 40 - start)
        assert list(rest) == whole[start:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_divide_the_same_global_batch(world_size: int) -> None:
    alone = StepBatchSampler(23, 8, seed=5)
    ranks = [StepBatchSampler(23, 8, 5, rank, world_size) for rank in range(world_size)]
    for step in range(20):
        assert sum((rank.batch(step) for rank in ranks), []) == alone.batch(step)


def test_each_epoch_is_a_new_permutation() -> None:
    sampler = StepBatchSampler(12, 4, seed=0)
    epochs = [sum((sampler.batch(3 * e + k) for k in range(3)), []) for e in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len(sampler._permutations) == 2
    # A batch longer than the data covers it several times over.
    assert sorted(StepBatchSampler(3, 7, seed=0).batch(0))[0:7:3] == [0, 1, 2]


def test_sampler_is_endless() -> None:
    with pytest.raises(TypeError):
        len(StepBatchSampler(10, 4, seed=1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 0}, "num_items: 0 is not an integer >= 1"),
        ({"global_batch_size": 0}, "global_batch_size: 0"),
        ({"global_batch_size": 6, "world_size": 4}, "6 is not a multiple of .* processes, 4"),
        ({"rank": 2, "world_size": 2}, r"rank: 2 is not in 0..1"),
        ({"seed": -1}, "seed: -1"),
        ({"start_step": -1}, "start_step: -1"),
    ],
)
def test_sampler_refusals(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepBatchSampler(**({"num_items": 10, "global_batch_size": 4, "seed": 0} | changes))


def module(text_file: Path, **changes: Any) -> TextDataModule:
    options = {
        "domains": {"a": str(text_file), "b": {"path": str(text_file)}},
        "seq_len": 16,
        "batch_size": 6,
        "cache_dir": text_file.parent / "cache",
        "seed": 3,
        "val_fraction": 0.1,
    }
    return TextDataModule(**(options | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": {}}, "domains: names .* got no domain"),
        ({"seq_len": 0}, "seq_len: 0 is not an integer >= 1"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": True}, "batch_size: True"),
        ({"val_batch_size": 0}, "val_batch_size: 0"),
        ({"max_bytes": -1}, "max_bytes: -1"),
        ({"val_fraction": 0.0}, "val_fraction: 0.0 is not between 0 and 1"),
        ({"val_fraction": 1.0}, "val_fraction: 1.0"),
        ({"max_val_windows": 0}, "max_val_windows: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"num_workers": -1}, "num_workers: -1"),
        ({"tokenizer": ""}, "tokenizer: ''"),
    ],
)
def test_module_refusals(text_file: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(text_file, **changes)


def test_module_without_a_trainer(text_file: Path) -> None:
    data = module(text_file)
    with pytest.raises(RuntimeError, match="after prepare_data"):
        _ = data.corpus
    data.prepare_data()
    data.setup()
    assert data.corpus.domains == ["a", "b"]
    first, second = itertools.islice(data.train_dataloader(), 2)
    assert first["input_ids"].shape == first["labels"].shape == (6, 16)
    assert first["domain"].shape == (6,)
    assert {value.dtype for value in first.values()} == {torch.int64}
    assert torch.equal(first["input_ids"][:, 1:], first["labels"][:, :-1])
    assert not torch.equal(first["input_ids"], second["input_ids"])
    again = next(iter(data.train_dataloader()))
    assert torch.equal(again["input_ids"], first["input_ids"])


def held_out(data: TextDataModule) -> list[tuple[int, ...]]:
    """Returns (domain, tokens..) of every validation window, in order."""
    rows = [
        torch.cat([batch["domain"][:, None], batch["input_ids"]], 1)
        for batch in data.val_dataloader()
    ]
    return [tuple(row) for row in torch.cat(rows).tolist()]


class _Place:
    """Stands for a trainer of two processes."""

    global_step, accumulate_grad_batches, world_size = 4, 1, 2

    def __init__(self, rank: int) -> None:
        self.global_rank = rank


def test_ranks_share_validation_without_a_duplicate(text_file: Path) -> None:
    data = module(text_file, seq_len=15, max_val_windows=22)
    data.setup()
    alone = held_out(data)
    assert alone == held_out(data)
    assert len(alone) == 22
    assert [row[0] for row in alone].count(0) == 11  # as many of each domain
    shares = []
    for rank in range(2):
        data.trainer = _Place(rank)  # type: ignore[assignment]
        shares.append(held_out(data))
    assert sorted(shares[0] + shares[1]) == sorted(alone)
    data.trainer = None  # type: ignore[assignment]
    data.max_val_windows = 2
    data.setup()
    data.trainer = _Place(0)  # type: ignore[assignment]
    assert len(held_out(data)) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_ranks_validate_in_as_many_batches(batch_size: int, world_size: int) -> None:
    for num_items in range(world_size, 40):
        cut = [even_batches(num_items, batch_size, r, world_size) for r in range(world_size)]
        assert len({len(batches) for batches in cut}) == 1
        assert sorted(i for batches in cut for batch in batches for i in batch) == [
            *range(num_items)
        ]
        size = -(-batch_size // world_size)
        assert max(len(batch) for batches in cut for batch in batches) <= size + (world_size > 1)


def test_ranks_continue_at_the_trainers_step(text_file: Path) -> None:
    data = module(text_file)
    data.setup()
    whole = list(itertools.islice(data.train_dataloader(), 6))
    parts = []
    for rank in range(2):
        data.trainer = _Place(rank)  # type: ignore[assignment]
        parts.append(list(itertools.islice(data.train_dataloader(), 2)))
    for step in range(2):
        both = torch.cat([parts[0][step]["input_ids"], parts[1][step]["input_ids"]])
        assert torch.equal(both, whole[4 + step]["input_ids"])


class _Recorder(pl.LightningModule):
    """Keeps the inputs it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"])
        return self.weight * batch["labels"].float().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(data: TextDataModule, steps: int, folder: Path, resume: Path | None) -> list[Tensor]:
    recorder = _Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, val_check_interval=3,
        check_val_every_n_epoch=None, use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(recorder, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return recorder.seen


def test_a_resumed_run_sees_the_rest_of_the_data(text_file: Path, tmp_path: Path) -> None:
    whole = train(module(text_file), 8, tmp_path, None)
    begun = train(module(text_file), 5, tmp_path, None)
    resumed = train(module(text_file), 8, tmp_path, tmp_path / "last.ckpt")
    assert len(whole) == len(begun + resumed) == 8
    assert all(torch.equal(a, b) for a, b in zip(whole, begun + resumed, strict=True))
