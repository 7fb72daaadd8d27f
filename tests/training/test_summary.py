"""What a summary says of the cost of a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from routerlab.analysis.flops import forward_flops
from routerlab.training.run_directory import RunDirectory
from routerlab.training.summary import flops_per_token
from tests.helpers.models import LENGTH, objective, tiny_batch, tiny_decoder


def test_flops_of_a_run_on_text(finished_run: Path) -> None:
    """The sizes of the tiny run: D = F = 32, 4 experts, top-2, 2 heads on 1, 2 layers, S = 32."""
    attention = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32) + 4 * 32 * 32
    layer = attention + 2 * 2 * 3 * 32 * 32 + 2 * 32 * 4
    summary = RunDirectory(finished_run).read_json("summary.json")
    assert summary["flops_per_token"] == 2 * layer + 2 * 32 * 256


def test_flops_of_a_run_on_tasks(tuned_run: Path) -> None:
    """At least two for each active weight that is no table; attention adds a little."""
    summary = RunDirectory(tuned_run).read_json("summary.json")
    lora = RunDirectory(tuned_run / "baselines" / "lora").read_json("summary.json")
    for found in (summary, lora):
        active = found["parameters"]["active"]
        assert active < found["flops_per_token"] < 4 * active


class Tasks:
    """Task data of sequences padded at the right."""

    task_names, val_batch_size = ("one",), 8

    def val_dataloader(self) -> DataLoader[Any]:
        batch = tiny_batch()
        batch |= {"prompt": batch["valid"], "task": batch["domain"]}
        batch |= {"gold": torch.ones(8, dtype=torch.long)}
        rows: Any = [{name: value[i] for name, value in batch.items()} for i in range(8)]
        return DataLoader(rows)


def test_sequences_are_counted_without_their_padding() -> None:
    batch, model = tiny_batch(), tiny_decoder()
    rows = [ids[real] for ids, real in zip(batch["input_ids"], batch["valid"], strict=True)]
    assert min(map(len, rows)) < LENGTH
    alone = sum(forward_flops(model, row[None]) for row in rows)
    found = flops_per_token(Tasks(), objective(model, {}))
    assert found == alone / sum(map(len, rows))


def test_a_model_that_cannot_be_counted_does_not_stop_a_run() -> None:
    class Broken(nn.Module):
        moe_layers: dict[str, Any] = {}

        def forward(self, *arguments: Any) -> None:
            raise NotImplementedError("no such operation")

    with pytest.warns(UserWarning, match="flops_per_token: not counted .*no such operation"):
        assert flops_per_token(Tasks(), objective(Broken(), {})) is None
