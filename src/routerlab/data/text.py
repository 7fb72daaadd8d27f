"""Language-model batches from text of several domains: windows, batch order, data module."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from routerlab.data.corpus import Corpus, check_names, open_corpus, prepare_corpus

__all__ = ["Corpus", "StepBatchSampler", "TextDataModule", "WindowDataset", "prepare_corpus"]

Spec = str | Mapping[str, Any]


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Gives windows of `seq_len` tokens and the tokens that follow each, domain after domain.

    Window w of a domain reads tokens [w * seq_len, (w + 1) * seq_len], so each token but the
    first is a label once; what is left at the end of a domain is dropped.
    """

    def __init__(self, tokens: Sequence[np.ndarray], seq_len: int, names: Sequence[str] = ()):
        self.seq_len = seq_len
        self.counts = [max(len(domain) - 1, 0) // seq_len for domain in tokens]
        for index, count in enumerate(self.counts):
            if count == 0:
                name = names[index] if names else index
                raise ValueError(
                    f"seq_len: {seq_len} needs at least {seq_len + 1} tokens of each domain and "
                    f"split; domain {name!r} has one of {len(tokens[index])}"
                )
        self._tokens = list(tokens)
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns input_ids [seq_len], labels [seq_len] and domain [], all int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        domain = int(np.searchsorted(self._ends, index, side="right"))
        window = index - int(self._ends[domain]) + self.counts[domain]
        start = window * self.seq_len
        tokens = self._tokens[domain][start : start + self.seq_len + 1]
        ids = torch.from_numpy(tokens.astype(np.int64))
        return {"input_ids": ids[:-1], "labels": ids[1:], "domain": torch.tensor(domain)}

    def evenly_spaced(self, most: int | None) -> list[int]:
        """Returns at most `most` indices, as many from each domain, spread over all of it."""
        if most is None:
            return list(range(len(self)))
        each = min(most // len(self.counts), *self.counts)
        if each == 0:
            raise ValueError(
                f"max_val_windows: {most} is less than one for each of {len(self.counts)} domains"
            )
        starts = self._ends - self.counts
        return [
            int(start) + place * count // each
            for start, count in zip(starts, self.counts, strict=True)
            for place in range(each)
        ]


class StepBatchSampler(Sampler[list[int]]):
    """Yields one rank's indices for optimizer steps start_step, start_step + 1, .. without end.

    The batch is a pure function of (seed, step, rank, world size), so a run resumes exactly from
    its step count alone, and ranks divide a global batch that does not depend on their number.
    There is no `__len__` on purpose: Lightning then sees one endless epoch.
    """

    def __init__(
        self,
        num_items: int,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        _at_least("num_items", num_items, 1)
        _at_least("global_batch_size", global_batch_size, 1)
        _at_least("seed", seed, 0)
        _at_least("start_step", start_step, 0)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank} is not in 0..{world_size - 1}")
        if global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size: {global_batch_size} is not a multiple of the number of "
                f"processes, {world_size}"
            )
        self.num_items = num_items
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.rank = rank
        self.batch_per_rank = global_batch_size // world_size
        self.start_step = start_step
        self._permutations: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[list[int]]:
        return (self.batch(step) for step in itertools.count(self.start_step))

    def batch(self, step: int) -> list[int]:
        """Returns this rank's indices for one step."""
        first = step * self.global_batch_size + self.rank * self.batch_per_rank
        places = (divmod(first + j, self.num_items) for j in range(self.batch_per_rank))
        return [int(self._permutation(epoch)[offset]) for epoch, offset in places]

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            if len(self._permutations) > 1:  # a batch rarely spans more than two epochs
                del self._permutations[min(self._permutations)]
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_items)
            self._permutations[epoch] = order
        return self._permutations[epoch]


class TextDataModule(pl.LightningDataModule):
    """Gives batches {input_ids, labels: int64 [B S], domain: int64 [B]} of several domains.

    `batch_size` counts sequences of one step over all processes; each process draws its share.
    Use `Trainer(use_distributed_sampler=False)`: the samplers here already divide the work.
    """

    def __init__(
        self,
        *,
        domains: Mapping[str, Spec],
        seq_len: int,
        batch_size: int,
        cache_dir: str | Path,
        seed: int,
        tokenizer: str = "bytes",
        val_batch_size: int | None = None,
        max_bytes: int = 4_000_000,
        val_fraction: float = 0.05,
        max_val_windows: int | None = None,
        final_val_windows: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Checks every value; nothing is read yet.

        `domains` maps a label to a built-in source, a file, or `datasets.load_dataset` options;
        `max_bytes` bounds each domain; `max_val_windows` picks evenly spaced held-out windows, as
        many from each domain, and `final_val_windows` does so for the last evaluation of a run
        (None: all of them).
        """
        super().__init__()
        check_names(list(domains))
        for field, value, least in [
            ("seq_len", seq_len, 1),
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("max_bytes", max_bytes, 1),
            ("max_val_windows", max_val_windows, 1),
            ("final_val_windows", final_val_windows, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ]:
            if value is not None:
                _at_least(field, value, least)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction: {val_fraction} is not between 0 and 1")
        if not tokenizer:
            raise ValueError("tokenizer: '' is neither 'bytes' nor a file")
        self.seq_len, self.batch_size = seq_len, batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.max_val_windows, self.final_val_windows = max_val_windows, final_val_windows
        self.seed, self.num_workers = seed, num_workers
        self._request = (
            dict(domains),
            tokenizer,
            max_bytes,
            val_fraction,
            Path(cache_dir).expanduser(),
        )
        self._corpus: Corpus | None = None

    def prepare_data(self) -> None:
        """Builds the cached corpus unless it is there; Lightning calls it in one process."""
        if self._corpus is None:
            prepare_corpus(*self._request)

    def setup(self, stage: str | None = None) -> None:
        """Opens the corpus, whatever the stage, and cuts it into windows."""
        if self._corpus is None:
            self._corpus = open_corpus(*self._request)
        names = self._corpus.domains
        self._train = WindowDataset(self._corpus.train, self.seq_len, names)
        self._val = WindowDataset(self._corpus.val, self.seq_len, names)
        self._val_indices = self._val.evenly_spaced(self.max_val_windows)

    def use_final_windows(self) -> None:
        """From now on the held-out windows are those of the last evaluation."""
        self.max_val_windows = self.final_val_windows
        self.setup()

    @property
    def corpus(self) -> Corpus:
        """Returns the open corpus; RuntimeError before `setup`."""
        if self._corpus is None:
            raise RuntimeError("the corpus is open only after prepare_data() and setup()")
        return self._corpus

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Returns an endless loader that goes on where the trainer's step count stands."""
        rank, world_size = place(self)
        step = 0
        if self.trainer is not None:
            step = self.trainer.global_step
        sampler = StepBatchSampler(
            len(self._train), self.batch_size, self.seed, rank, world_size, step
        )
        return DataLoader(self._train, batch_sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Returns this process's share of the held-out windows: each window in exactly one."""
        rank, world_size = place(self)
        batches = even_batches(len(self._val_indices), self.val_batch_size, rank, world_size)
        held_out = Subset(self._val, self._val_indices)
        return DataLoader(held_out, batch_sampler=batches, num_workers=self.num_workers)


def even_batches(
    num_items: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Returns batches of a rank's share of the items, which is every `world_size`-th.

    `batch_size` counts items over all ranks. Every rank has as many batches, since processes that
    share a model run it at the same time; the last of some ranks may be larger by one.
    """
    share, size = range(rank, num_items, world_size), -(-batch_size // world_size)
    count = max(1, -(-(num_items // world_size) // size))
    starts = [*range(0, count * size, size), len(share)]
    return [list(share[a:b]) for a, b in itertools.pairwise(starts) if a < b]


def place(data: pl.LightningDataModule) -> tuple[int, int]:
    """Returns (rank, number of processes) of the trainer that uses `data`."""
    if data.trainer is None:
        return 0, 1
    return data.trainer.global_rank, data.trainer.world_size


def _at_least(field: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{field}: {value} is not an integer >= {least}")
