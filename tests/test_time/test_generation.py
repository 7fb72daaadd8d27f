"""Rerouted generation: phases, caches, padding."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.adapters import MixtureOfLoraConfig
from routerlab.backbones.hugging_face import HuggingFaceMoE
from routerlab.backbones.pretrained import PretrainedLM
from routerlab.core.routing import RoutingContext
from routerlab.test_time.generation import generate
from routerlab.test_time.offsets import Offsets
from routerlab.test_time.plug_in import Edit, edited
from routerlab.test_time.rewiring import Rewiring
from routerlab.test_time.steering import Steering
from tests.helpers.language_models import VOCAB, save_tiny
from tests.helpers.mixtures import TOP_2, stir
from tests.helpers.models import tiny_decoder
from tests.helpers.moe_models import tiny_config


class Watched(Rewiring):
    """Remembers at which lengths it adapted, and its edits."""

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**({"eta": 5.0, "num_steps": 2} | knobs))
        self.lengths: list[int] = []
        self.edits: list[Offsets] = []

    def adapt(
        self,
        backbone: Any,
        batch: Mapping[str, Tensor],
        context: RoutingContext,
        previous: Edit | None = None,
    ) -> Offsets:
        self.lengths.append(batch["input_ids"].shape[1])
        self.edits.append(super().adapt(backbone, batch, context, previous))
        return self.edits[-1]


def wrapped(family: str = "olmoe") -> HuggingFaceMoE:
    torch.manual_seed(0)
    return HuggingFaceMoE(config=tiny_config(family), trainable="none").eval()


def adapted(folder: Path) -> PretrainedLM:
    torch.manual_seed(0)
    config = MixtureOfLoraConfig(router=TOP_2, num_experts=4, r=2, target_modules=["up_proj"])
    model = PretrainedLM(str(save_tiny(folder / "model")), folder / "cache", config).eval()
    stir(model)
    return model


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Any]:
    decoder = tiny_decoder(vocab_size=VOCAB, max_positions=64, num_layers=3).eval()
    return {"decoder": decoder, "wrapped": wrapped(), "adapter": adapted(tmp_path)}


def likeliest(model: Any, ids: Tensor, valid: Tensor, edit: Edit | None, count: int) -> Tensor:
    """``count`` tokens more by full passes under one edit."""
    for _ in range(count):
        context = RoutingContext(*ids.shape, valid=valid.flatten())
        with torch.no_grad(), edited(model, edit):
            logits = model(ids, context, logits_to_keep=1).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        valid = torch.cat([valid, valid.new_ones(len(ids), 1)], dim=1)
    return ids


def ragged() -> tuple[Tensor, Tensor]:
    """Prompts of 7 and 4 tokens, padded on the left."""
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(7) >= torch.tensor([[0], [3]])
    return ids, valid


@pytest.mark.parametrize("name", ["decoder", "wrapped", "adapter"])
def test_a_cache_that_is_built_anew_says_what_full_passes_say(
    models: dict[str, Any], name: str
) -> None:
    model, (ids, valid), plug_in = models[name], ragged(), Watched(every=4)
    found = generate(model, ids, valid, 10, plug_in)
    assert plug_in.lengths == [7, 11, 15]
    assert any((v != 0).any() for v in plug_in.edits[0].by_layer.values())
    for start, edit in zip((7, 11, 15), plug_in.edits, strict=True):
        end = min(start + 4, 17)
        before = torch.cat([valid, valid.new_ones(2, start - 7)], dim=1)
        again = likeliest(model, found[:, :start], before, edit, end - start)
        assert torch.equal(again, found[:, :end])


@pytest.mark.parametrize("name", ["decoder", "wrapped", "adapter"])
def test_without_steps_it_is_plain_generation(models: dict[str, Any], name: str) -> None:
    model, (ids, valid) = models[name], ragged()
    plain = likeliest(model, ids, valid, None, 9)
    assert torch.equal(generate(model, ids, valid, 9), plain)
    for knobs in ({"num_steps": 0}, {"eta": 0}):
        assert torch.equal(generate(model, ids, valid, 9, Rewiring(every=3, **knobs)), plain)


def test_steering_is_once_and_for_every_token(models: dict[str, Any]) -> None:
    ids, valid = ragged()
    plug_in = Steering({0: [1], 2: [0]}, strength=1)
    for model in models.values():
        if model is models["adapter"]:  # of two layers
            plug_in = Steering({0: [1], 1: [0]}, strength=1)
        edit = plug_in.adapt(model, {}, RoutingContext(2, 7))
        expected = likeliest(model, ids, valid, edit, 8)
        assert torch.equal(generate(model, ids, valid, 8, plug_in), expected)


def test_phases_of_three_hundred_tokens() -> None:
    model = tiny_decoder(max_positions=305, d_model=4, d_ff=2, num_layers=1).eval()
    plug_in = Watched(num_steps=1)
    found = generate(model, torch.tensor([[1, 2, 3]]), None, 300, plug_in)
    assert found.shape == (1, 303)
    assert [length - 3 for length in plug_in.lengths] == [0, 128, 256]


def test_phases_go_on_from_each_other_unless_reset() -> None:
    model, ids = wrapped(), ragged()[0]
    kept, reset = Watched(every=3), Watched(every=3, reset_each_phase=True)
    found = generate(model, ids, None, 6, kept)
    generate(model, ids, None, 6, reset)
    batch = {"input_ids": found[:, :10]}
    context = RoutingContext(2, 10, prompt=torch.ones(20, dtype=torch.bool))
    fresh = Rewiring(eta=5.0, num_steps=2).adapt(model, batch, context).by_layer
    for name, vectors in fresh.items():
        torch.testing.assert_close(reset.edits[1].by_layer[name], vectors)
    assert any(not torch.equal(kept.edits[1].by_layer[name], v) for name, v in fresh.items())
    still = Rewiring(num_steps=0).adapt(model, batch, context, kept.edits[0]).by_layer
    anew = Rewiring(num_steps=0, reset_each_phase=True).adapt(model, batch, context, kept.edits[0])
    for name, vectors in kept.edits[0].by_layer.items():
        assert torch.equal(still[name], vectors)
        assert not anew.by_layer[name].any()


def test_it_learns_inside_inference_mode_too() -> None:
    model, (ids, valid) = wrapped(), ragged()
    outside, inside = Watched(every=3), Watched(every=3)
    wanted = generate(model, ids, valid, 6, outside)
    with torch.inference_mode():
        assert torch.equal(generate(model, ids.clone(), valid.clone(), 6, inside), wanted)
    for one, other in zip(outside.edits, inside.edits, strict=True):
        assert any(vectors.any() for vectors in one.by_layer.values())
        assert all(torch.equal(other.by_layer[n], v) for n, v in one.by_layer.items())


def test_text_that_ends_in_padding_does_not_go_on() -> None:
    ids, valid = ragged()
    with pytest.raises(ValueError, match="padding must be on the left"):
        generate(wrapped(), ids, valid.flip(1), 2)
