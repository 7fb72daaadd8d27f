"""Which models can be split over processes; that they then compute the same: tests/training."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from routerlab.dispatch.expert_parallel import ExpertParallel
from routerlab.objectives.rehearsal import rehearse
from routerlab.objectives.sharding import shard, why_not_shardable
from routerlab.objectives.step import rank, world_size
from routerlab.ops.sharded import whole
from routerlab.routers.subset_sampling import SubsetSampling
from tests.helpers.distributed import run_distributed
from tests.helpers.models import objective, tiny_batch, tiny_decoder


def test_a_decoder_can_be_split() -> None:
    assert why_not_shardable(tiny_decoder()) is None
    assert objective(tiny_decoder(), {}).why_not_shardable() is None


def test_other_models_say_why_not() -> None:
    assert "Linear cannot be split" in str(why_not_shardable(nn.Linear(2, 2)))
    sampling = tiny_decoder(router=SubsetSampling)
    assert "layers.00.moe: a router that samples" in str(why_not_shardable(sampling))
    kept = tiny_decoder(num_experts=[0, 4])
    kept.embed_tokens.requires_grad_(False)
    kept.layers[0].requires_grad_(False)
    kept.keep_trunk()
    assert "keep_trunk=true" in str(why_not_shardable(kept))


def _rehearsed_by_one() -> None:
    if dist.get_rank() == 0:
        rehearse(objective(tiny_decoder(dispatch=ExpertParallel()), {}))


def test_a_later_run_of_a_job_is_rehearsed_by_each_process_alone(tmp_path: Path) -> None:
    assert run_distributed(_rehearsed_by_one, world_size=2, tmp_path=tmp_path) == [None, None]


def _clipped(limit: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The norm of a step's gradient, and the gradient that is left of it."""
    backbone, batch = tiny_decoder(dispatch=ExpertParallel(size=2)), tiny_batch(8)
    if world_size() > 1:
        shard(backbone, init_device_mesh("cpu", (world_size(),)))
        batch = {key: value.tensor_split(world_size())[rank()] for key, value in batch.items()}
    model = objective(backbone, {}, gradient_clip_norm=limit)
    model.accumulate([batch], [model.context(batch, 0, 0)], due=False)
    norm = model._clip()
    named = backbone.named_parameters()
    return norm, {name: whole(p.grad) for name, p in named if p.grad is not None}


def test_clipping_where_experts_are_split_otherwise(tmp_path: Path) -> None:
    norm, wanted = _clipped(0.01)
    assert norm > 0.1
    left = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    torch.testing.assert_close(left.item(), 0.01, rtol=1e-4, atol=0)
    for answer in run_distributed(_clipped, 0.01, world_size=4, tmp_path=tmp_path):
        torch.testing.assert_close(answer, (norm, wanted), rtol=1e-9, atol=1e-11)
