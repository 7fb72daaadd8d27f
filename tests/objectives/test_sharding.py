"""Which models can be split over processes; that they then compute the same: tests/training."""

from torch import nn

from routerlab.objectives.sharding import why_not_shardable
from routerlab.routers.subset_sampling import SubsetSampling
from tests.helpers.models import objective, tiny_decoder


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
