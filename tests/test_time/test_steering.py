"""Steering: numbers by hand, what stays as it is, and what is refused."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.backbones.hugging_face import HuggingFaceMoE
from routerlab.core.routing import RoutingContext
from routerlab.routers.token_choice import TokenChoice
from routerlab.test_time.identity import Identity
from routerlab.test_time.plug_in import TestTime as Protocol
from routerlab.test_time.plug_in import rerouting
from routerlab.test_time.steering import Steering
from tests.helpers.language_models import VOCAB
from tests.helpers.models import tiny_batch, tiny_decoder
from tests.helpers.moe_models import tiny_config

Z = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)


def steered(**knobs: Any) -> Tensor:
    return Steering({}, **knobs).steer(Z, [2] if knobs.get("form", "soft") == "soft" else [3])


def run(model: Any, plug_in: Any, batch: dict[str, Tensor]) -> Any:
    context = RoutingContext(*batch["input_ids"].shape)
    with rerouting(plug_in, model, batch, context):
        return model(batch["input_ids"], context)


def test_soft_adds_a_standard_deviation() -> None:
    found = steered()
    assert float(found[0, 2]) == pytest.approx(0.559017, abs=1e-6)
    expected = [0.604463, 0.222369, 0.143073, 0.030094]
    assert found.softmax(-1)[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert float(steered(sample_std=True)[0, 2]) == pytest.approx(0.5 * 1.290994, abs=1e-6)
    assert float(steered(strength=-0.5)[0, 2]) == pytest.approx(-0.559017, abs=1e-6)


def test_activate_and_deactivate() -> None:
    found = steered(form="activate").softmax(-1)[0]
    expected = [0.399486, 0.146963, 0.054065, 0.399486]
    assert found.tolist() == pytest.approx(expected, abs=2e-6)
    best = found.topk(2)
    assert sorted(best.indices.tolist()) == [0, 3]
    assert (best.values / best.values.sum()).tolist() == pytest.approx([0.5, 0.5], abs=2e-6)
    lowest = Steering({}, form="deactivate").steer(Z, [0])[0]
    assert float(lowest[0]) == pytest.approx(-1, abs=1e-5)
    assert lowest[1:].tolist() == Z[0, 1:].tolist()


def test_all_move_from_the_original_logits() -> None:
    found = Steering({}, form="activate").steer(Z, [1, 3])[0]
    assert found.tolist() == pytest.approx([2, 2, 0, 2], abs=1e-5)
    assert len({*found.tolist()}) == 4  # noise breaks the ties
    soft = Steering({}).steer(Z, [0, 1])[0]
    assert soft.tolist() == pytest.approx([2.559017, 1.559017, 0, -1], abs=1e-6)


def test_noise_is_seen_in_bfloat16_too() -> None:
    found = Steering({}, form="activate").steer(Z.bfloat16().expand(64, 4), [1, 3])
    assert found.dtype == torch.float32
    assert (found[:, 1] != found[:, 3]).float().mean() > 0.8


@pytest.mark.parametrize(
    "plug_in",
    [Identity(), Steering({}), Steering({1: []}), Steering({0: [1], 1: [2, 3]}, strength=0)],
)
def test_nothing_to_do_changes_no_bit(plug_in: Any) -> None:
    assert isinstance(plug_in, Protocol)
    batch = {"input_ids": torch.randint(VOCAB, (2, 7))}
    for model in (
        tiny_decoder(vocab_size=VOCAB).eval(),
        HuggingFaceMoE(config=tiny_config("olmoe"), trainable="none").eval(),
        HuggingFaceMoE(config=tiny_config("deepseek_v3", first_k_dense_replace=0)).eval(),
    ):
        assert torch.equal(run(model, plug_in, batch).logits, model(batch["input_ids"]).logits)


def test_layers_below_the_steered_are_as_they_were() -> None:
    model = tiny_decoder(num_layers=3).eval()
    batch = tiny_batch(ragged=False)
    before = model(batch["input_ids"]).router_outputs
    after = run(model, Steering({1: [0]}, form="activate"), batch).router_outputs
    first, second, third = before
    assert torch.equal(after[first].router_logits, before[first].router_logits)
    chosen = after[second].router_logits[:, 0]
    assert torch.allclose(chosen, before[second].router_logits.amax(1), atol=1e-4)
    assert torch.equal(after[second].router_logits[:, 1:], before[second].router_logits[:, 1:])
    assert not torch.equal(after[third].router_logits, before[third].router_logits)
    assert int(after[second].tokens_per_expert[0]) == batch["input_ids"].numel()


def test_padding_and_company_do_not_change_what_is_steered() -> None:
    model = tiny_decoder().eval()
    ids = tiny_batch(2, ragged=False)["input_ids"]
    plug_in = Steering({0: [1], 1: [2]})
    together = run(model, plug_in, {"input_ids": ids}).logits
    alone = run(model, plug_in, {"input_ids": ids[:1]}).logits
    torch.testing.assert_close(together[:1], alone)
    padded = torch.cat([torch.zeros_like(ids[:1, :3]), ids[:1]], dim=1)
    valid = (torch.arange(padded.shape[1]) >= 3)[None]
    context = RoutingContext(*padded.shape, valid=valid.flatten())
    with rerouting(plug_in, model, {"input_ids": padded}, context):
        torch.testing.assert_close(model(padded, context).logits[:, 3:], alone)


def test_a_wrapped_model_is_steered_by_its_own_law() -> None:
    model = HuggingFaceMoE(config=tiny_config("qwen3_moe"), trainable="none").eval()
    batch = {"input_ids": torch.randint(VOCAB, (2, 5))}
    records = run(model, Steering({1: [6]}, form="activate"), batch).router_outputs
    first = records["layers.01.moe"]
    assert int(first.tokens_per_expert[6]) == 10
    shares = first.combine_weights.view(10, -1)
    torch.testing.assert_close(shares.sum(1), torch.ones(10))


@pytest.mark.parametrize(
    ("experts", "knobs", "message"),
    [
        ({5: [0]}, {}, r"layers \[5\] are not routed; those that are: \[0, 1\]"),
        ({0: [4, 1]}, {}, r"layer 0 has no experts \[4\]; its numbers go from 0 to 3"),
        ({1: [-1]}, {}, r"no experts \[-1\]"),
        ({1: [0, 1]}, {"form": "activate"}, "2 forced in layer 1, where a token has 2"),
    ],
)
def test_experts_that_are_not_there(experts: Any, knobs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_decoder(), Steering(experts, **knobs), tiny_batch())


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="form='hard': must be one of 'soft', 'activate'"):
        Steering({}, form="hard")
    with pytest.raises(ValueError, match="strength=2: must be at least -1 and at most 1"):
        Steering({}, strength=2)


def test_sigmoid_experts_are_steered_in_choice_and_weight() -> None:
    router = partial(TokenChoice, top_k=2, score_fn="sigmoid", init_std=1.0)
    model = tiny_decoder(router=router).eval()
    batch = tiny_batch(ragged=False)
    plain = model(batch["input_ids"]).router_outputs["layers.00.moe"]
    moved = run(model, Steering({0: [3]}, strength=1), batch).router_outputs["layers.00.moe"]
    assert moved.tokens_per_expert[3] > plain.tokens_per_expert[3]
    assert (moved.router_probs[:, 3] > plain.router_probs[:, 3]).all()
