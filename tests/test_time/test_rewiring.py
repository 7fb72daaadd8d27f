"""Rewiring on a model: what moves and what does not, and whom it looks at."""

import hashlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routerlab.backbones.decoder import Decoder
from routerlab.core.routing import RoutingContext
from routerlab.routers.token_choice import TokenChoice
from routerlab.test_time.plug_in import rerouting
from routerlab.test_time.rewiring import Rewiring
from tests.helpers.models import VOCAB, tiny_decoder


def prompts(
    lengths: list[int], seed: int = 0, left: bool = True
) -> tuple[dict[str, Tensor], RoutingContext]:
    """Random prompts of these lengths, padded."""
    size = (len(lengths), max(lengths))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, size, generator=generator)
    places = torch.arange(size[1])
    valid = (places.flip(0) if left else places) < torch.tensor(lengths)[:, None]
    flat = valid.flatten()
    return {"input_ids": ids}, RoutingContext(*size, valid=flat, prompt=flat)


def rewired(model: Decoder, data: Any, **knobs: Any) -> Rewiring:
    plug_in = Rewiring(**({"eta": 1.0} | knobs))
    plug_in.adapt(model, *data)
    return plug_in


# -- on a model -----------------------------------------------------------------------------------


def checksum(model: nn.Module) -> str:
    state = b"".join(t.numpy().tobytes() for t in model.state_dict().values())
    return hashlib.sha256(state).hexdigest()


def test_only_offsets_of_selected_layers_change() -> None:
    model = tiny_decoder(num_layers=4).eval()
    model.layers[0].requires_grad_(False)
    asked = [p.requires_grad for p in model.parameters()]
    before = checksum(model)
    phase = rewired(model, prompts([6, 4])).phase
    assert phase is not None
    assert checksum(model) == before
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())
    assert phase.shares.sum(1).tolist() == [2.0, 2.0]
    vectors = torch.stack(list(phase.offsets.by_layer.values()), dim=1)  # [P L E]
    assert torch.equal(vectors.abs().sum(2) > 0, phase.shares > 0)


def test_layers_below_the_selected_are_left_out_of_the_backward_pass() -> None:
    model, seen = tiny_decoder(num_layers=4).eval(), []
    model.layers[2].register_forward_hook(lambda m, a, out: seen.append(out[0].requires_grad))
    rewired(model, prompts([6, 4]), num_steps=3, score="last", layer_share=0.25)
    assert seen == [True, False, False]  # the first pass selects


@pytest.mark.parametrize("left", [True, False])
def test_sequences_do_not_know_of_each_other(left: bool) -> None:
    model = tiny_decoder(num_layers=3).eval()
    batch, context = prompts([6, 3, 5], left=left)
    together = rewired(model, (batch, context)).phase
    assert together is not None
    for row, length in enumerate((6, 3, 5)):
        ids = batch["input_ids"][row][context.valid.view(3, -1)[row]][None]  # type: ignore[union-attr]
        alone_context = RoutingContext(1, length, prompt=torch.ones(length, dtype=torch.bool))
        alone = rewired(model, ({"input_ids": ids}, alone_context)).phase
        assert alone is not None
        for name, vectors in alone.offsets.by_layer.items():
            torch.testing.assert_close(together.offsets.by_layer[name][row], vectors[0])
        torch.testing.assert_close(together.losses[:, row], alone.losses[:, 0])


def test_the_next_example_does_not_know_of_the_last() -> None:
    model, plug_in = tiny_decoder().eval(), Rewiring(eta=1.0)
    fresh = Rewiring(eta=1.0).adapt(model, *prompts([6, 4], seed=1))
    plug_in.adapt(model, *prompts([5, 5], seed=0))
    after = plug_in.adapt(model, *prompts([6, 4], seed=1))
    for name, vectors in fresh.by_layer.items():
        assert torch.equal(after.by_layer[name], vectors)


def test_every_layer_selected_is_all_layers() -> None:
    model, data = tiny_decoder(num_layers=3).eval(), prompts([6, 6])
    every = rewired(model, data, selection="all").phase
    hard = rewired(model, data, selection="hard", layer_share=1.0).phase
    assert every is not None
    assert hard is not None
    for name, vectors in every.offsets.by_layer.items():
        assert torch.equal(hard.offsets.by_layer[name], vectors)


def test_the_loss_falls_with_soft_experts() -> None:
    model = tiny_decoder(router=partial(TokenChoice, top_k=4, init_std=1.0), num_layers=3).eval()
    phase = rewired(model, prompts([6, 5, 4]), num_steps=10, eta=0.5, selection="soft").phase
    assert phase is not None
    assert (phase.losses.diff(dim=0) < 0).all()


def test_what_follows_the_prompt_is_not_looked_at() -> None:
    model = tiny_decoder().eval()
    batch, _ = prompts([6, 6])
    prompt = (torch.arange(6) < 4).expand(2, 6).flatten()
    context = RoutingContext(2, 6, prompt=prompt)
    one = Rewiring(eta=1.0).adapt(model, batch, context)
    other = {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 4:] = (other["input_ids"][:, 4:] + 1) % VOCAB
    two = Rewiring(eta=1.0).adapt(model, other, context)
    assert all(torch.equal(two.by_layer[n], v) for n, v in one.by_layer.items())


def test_rows_of_an_item_share_a_prompt_that_is_read_once() -> None:
    model, plug_in = tiny_decoder().eval(), Rewiring(eta=1.0, num_steps=2)
    ids = prompts([6, 6])[0]["input_ids"]
    prompt = (torch.arange(6) < 4).expand(3, 6)
    batch = {"input_ids": ids[[0, 0, 1]], "item": torch.tensor([5, 5, 2])}
    edit = plug_in.adapt(model, batch, RoutingContext(3, 6, prompt=prompt.flatten()))
    assert edit.owner.tolist() == [1, 1, 0]
    assert [len(v) for v in edit.by_layer.values()] == [2, 2]
    assert (plug_in.cost.forward_passes, plug_in.cost.backward_passes) == (2, 2)
    assert plug_in.cost.tokens == 2 * 2 * 4
    assert plug_in.cost.seconds > 0
    alone = Rewiring(eta=1.0, num_steps=2).adapt(
        model, {"input_ids": ids[:1]}, RoutingContext(1, 6, prompt=prompt[0])
    )
    for name, vectors in alone.by_layer.items():
        torch.testing.assert_close(edit.by_layer[name][1], vectors[0])


def test_a_prompt_of_one_token_keeps_its_routing() -> None:
    model = tiny_decoder().eval()
    phase = rewired(model, prompts([6, 1]), selection="all").phase
    assert phase is not None
    assert all((v[1] == 0).all() and (v[0] != 0).any() for v in phase.offsets.by_layer.values())
    assert (phase.losses[:, 1] == 0).all()


def test_no_step_or_no_size_changes_no_bit() -> None:
    model = tiny_decoder().eval()
    batch, context = prompts([6, 4])
    plain = model(batch["input_ids"], context).logits
    for knobs in ({"num_steps": 0}, {"eta": 0}):
        with rerouting(Rewiring(**knobs), model, batch, context):
            assert torch.equal(model(batch["input_ids"], context).logits, plain)
    with rerouting(Rewiring(eta=1.0), model, batch, context):
        assert not torch.equal(model(batch["input_ids"], context).logits, plain)
    assert torch.equal(model(batch["input_ids"], context).logits, plain)


def test_checkpointed_layers_give_the_same_offsets() -> None:
    data, found = prompts([6, 5]), []
    for checkpointed in (False, True):
        model = tiny_decoder(activation_checkpointing=checkpointed).eval()
        found.append(Rewiring(eta=1.0).adapt(model, *data))
    for name, vectors in found[0].by_layer.items():
        assert torch.equal(found[1].by_layer[name], vectors)


def test_offsets_are_float32_in_a_model_of_bfloat16() -> None:
    model = tiny_decoder().to(torch.bfloat16).eval()
    edit = Rewiring(eta=1e-4, selection="all").adapt(model, *prompts([6, 5]))
    assert all(v.dtype == torch.float32 and v.abs().sum() > 0 for v in edit.by_layer.values())


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_steps": -1}, "num_steps=-1: must be at least 0"),
        ({"eta": -0.1}, "eta=-0.1"),
        ({"selection": "some"}, "selection='some': must be one of 'hard', 'soft', 'all'"),
        ({"score": "entropy"}, "score='entropy': must be one of 'confidence'"),
        ({"layer_share": 0}, "layer_share=0: must be above 0 and at most 1"),
        ({"every": 0}, "every=0"),
        ({"selection": "soft", "score": "negative_entropy"}, "turn it around"),
    ],
)
def test_wrong_values_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewiring(**knobs)


def test_a_model_or_a_batch_it_does_not_go_with() -> None:
    from routerlab.routers.hash import HashRouter

    batch, context = prompts([6, 5])
    with pytest.raises(ValueError, match="told what the prompt is"):
        Rewiring().adapt(tiny_decoder(), batch, RoutingContext(2, 6))
    hashed = tiny_decoder(router=HashRouter).eval()
    with pytest.raises(ValueError, match="HashRouter has no router logits to edit"):
        Rewiring().adapt(hashed, batch, context)
