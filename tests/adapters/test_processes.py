"""What needs processes of its own: several of them, or one without checks of types."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.adapters.forms import adapted, gradients, logits_of, run, some_ids
from tests.helpers.distributed import run_distributed

REMIX: dict[str, Any] = {"router": "subset_sampling", "top_k": 2}


def _loss(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model(input_ids=ids, labels=ids, **options).loss


def _gradients_of_ranks(**options: Any) -> dict[str, Tensor]:
    model = adapted("lora", **options)
    parallel = DistributedDataParallel(model)
    ids = some_ids(4).chunk(2)[dist.get_rank()]
    for _ in range(2):  # a second pass finds the buckets as the first left them
        model.zero_grad()
        _loss(parallel, ids).backward()
    return gradients(model)


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    ranks = run_distributed(_gradients_of_ranks, world_size=2, tmp_path=tmp_path)
    model = adapted("lora")
    _loss(model, some_ids(4)).backward()
    want = gradients(model)
    for got in ranks:
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7)


def _compiled_and_eager(form: str, options: dict[str, Any]) -> tuple[Tensor, Tensor, bool]:
    model, ids = adapted(form, **options), some_ids()
    want, names = logits_of(model, ids), list(model.base_model.state.records)
    model.base_model.model.compile(backend="eager", fullgraph=False)
    got = logits_of(model, ids)
    same = list(model.base_model.state.records) == names
    run(model.train(), ids, labels=ids).loss.backward()
    return got, want, same and all(g.isfinite().all() for g in gradients(model).values())


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("lora", {}),
        pytest.param("feed_forward", {}, marks=pytest.mark.slow),
        pytest.param("skills", {}, marks=pytest.mark.slow),
        pytest.param("lora", REMIX, marks=pytest.mark.slow),
    ],
)
def test_compiled_it_computes_the_same(form: str, options: dict[str, Any], tmp_path: Path) -> None:
    (result,) = run_distributed(
        _compiled_and_eager, form, options, world_size=1, tmp_path=tmp_path, timeout=200.0
    )
    got, want, works = result
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert works
