"""Nothing on the way of a training step waits for the device, layer by layer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from routerlab.core.config import compose
from routerlab.core.routing import RoutingContext
from routerlab.training.assemble import build_objective
from routerlab.training.build import build_backbone
from tests.helpers.waiting import WaitsForDevice

SMALL = (
    "experiment=quickstart",
    "backbone.d_model=32",
    "backbone.num_layers=3",
    "backbone.num_heads=2",
    "backbone.d_ff=16",
    "dispatch.engine=grouped",  # as on a GPU
)
# In training, with their own defaults and without padding. Most have a number of experts that
# differs between tokens, or a capacity: a record of the kept assignments is as long as they are.
WAITING = {
    "base": "assigns on the host",
    "by_task": "checks task numbers",
    "dynamoe": "varying number of experts",
    "dynmole": "varying number of experts",
    "expert_choice": "varying number of experts",
    "expert_choice_capped": "varying number of experts",
    "gshard": "capacity",
    "hash": "copies its salts",
    "lora_mixer": "copies the list of its experts",
    "s_base": "iterates until balance",
    "selective_sinkhorn": "draws on the host, iterates until balance",
    "sinkhorn": "iterates until balance",
    "st_moe": "capacity",
    "switch": "capacity",
    "threshold": "varying number of experts",
    "top_p": "varying number of experts",
}
ROUTERS = {path.stem for path in (Path(__file__).parents[2] / "configs" / "router").glob("*.yaml")}


def test_what_waits_is_found() -> None:
    x = torch.arange(6.0).view(2, 3)

    def assign(value: Tensor | float) -> None:
        x[x > 2] = value

    examples = {
        "_local_scalar_dense": lambda: float(x.sum()),
        "aten::nonzero": lambda: x.nonzero(),
        "aten::index": lambda: x[x > 2],
        "aten::index_put_": lambda: assign(torch.ones(3)),
        "aten::bincount": lambda: torch.bincount(x[0].long()),
        "repeat_interleave": lambda: x.repeat_interleave(torch.tensor([1, 2]), 0),
        "tolist": lambda: x.tolist(),
        "new_tensor": lambda: x.new_tensor(1.0),
        "cpu": lambda: x.cpu(),
    }
    for name, example in examples.items():
        with WaitsForDevice() as waits:
            example()
        assert any(name in line for line in waits.found), name
    counts, index = torch.tensor([1, 2]), torch.tensor([0, 1])
    with WaitsForDevice() as waits:
        x.repeat_interleave(counts, 0, output_size=3)
        _ = x[index, index]
        assign(0.0)
        x.new_full((), 3)
    assert waits.found == []


@pytest.mark.parametrize("due", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_of_the_quickstart_reads_the_device_once_at_its_end(
    due: bool, micro_batches: int
) -> None:
    objective = build_objective(compose(*SMALL))
    ids = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "domain": torch.tensor([0, 0, 0, 0])}
    size = 4 // micro_batches
    parts = [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, 4, size)]
    contexts = [objective.context(part, 0, i) for i, part in enumerate(parts)]
    with WaitsForDevice() as waits:
        _, sums, _ = objective.accumulate(parts, contexts, due)
    gate = objective.backbone.layers[0].moe.router.gate.weight
    assert gate.grad.abs().sum() > 0  # forward and backward were watched
    assert bool(sums.values()) == due
    assert len(waits.found) <= 1
    assert all("objectives/" in line for line in waits.found), waits.found


@pytest.mark.parametrize("router", sorted(ROUTERS - {"native"}))
def test_which_routers_wait(router: str) -> None:
    backbone = build_backbone(compose(*SMALL, f"router={router}", "backbone.num_layers=1"))
    ids = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3])
    context = RoutingContext(4, 16, domain_ids=labels, num_domains=4, task_ids=labels)
    with WaitsForDevice() as waits:
        backbone(ids, context).logits.square().sum().backward()
    assert bool(waits.found) == (router in WAITING), waits.found


def test_a_capacity_is_searched_once_a_layer() -> None:
    backbone = build_backbone(compose(*SMALL, "router=switch", "backbone.num_layers=2"))
    ids = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0))
    with WaitsForDevice() as waits:
        out = backbone(ids)
        out.logits.square().sum().backward()
    assert len(waits.found) == 2, waits.found
    assert sum(int(record.num_dropped) for record in out.router_outputs.values()) > 0
