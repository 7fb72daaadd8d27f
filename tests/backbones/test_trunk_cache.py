"""What frozen layers make of a sequence is computed once, and nothing else changes."""

from functools import partial

import pytest
import torch

from routerlab.backbones.decoder import Decoder
from routerlab.backbones.frozen import train_part
from routerlab.core.routing import RoutingContext
from routerlab.routers.token_choice import TokenChoice


def decoder(experts: list[int], trainable: str = "routers") -> Decoder:
    torch.manual_seed(0)
    model = Decoder(
        partial(TokenChoice, top_k=2, init_std=0.5), vocab_size=50, d_model=16, num_layers=4,
        num_heads=2, num_kv_heads=1, d_ff=24, num_experts=experts, max_positions=16,
    )  # fmt: skip
    train_part(model, trainable)
    return model


def batch(lengths: list[int], seed: int) -> tuple[torch.Tensor, RoutingContext]:
    """Left-padded sequences; the last tokens of a longer one are a shorter one of the same seed."""
    size = max(lengths)
    ids = torch.randint(50, (len(lengths), size), generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(size) >= size - torch.tensor(lengths)[:, None]
    return ids, RoutingContext(len(lengths), size, valid=valid.reshape(-1))


def counted(model: Decoder) -> list[int]:
    """Sequences that pass the first layer, pass by pass."""
    seen: list[int] = []
    model.layers[0].register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    return seen


def test_logits_records_and_gradients_are_those_without_it():
    plain, keeping = decoder([0, 0, 4, 4]), decoder([0, 0, 4, 4])
    keeping.keep_trunk()
    for lengths, seed in (([5, 9, 3], 1), ([9, 9, 9], 1), ([5, 9, 3], 1)):
        ids, context = batch(lengths, seed)
        real = context.valid.view_as(ids)
        outs = [model(ids, context) for model in (plain, keeping)]
        torch.testing.assert_close(outs[1].logits[real], outs[0].logits[real], rtol=1e-4, atol=1e-5)
        for name, record in outs[0].router_outputs.items():
            other = outs[1].router_outputs[name]
            assert torch.equal(record.expert_indices, other.expert_indices)
        for out in outs:
            out.logits[real].square().sum().backward()
    for one, other in zip(plain.parameters(), keeping.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4)


def test_a_sequence_runs_once_wherever_its_padding_is():
    model = decoder([0, 0, 4, 4])
    model.keep_trunk()
    seen = counted(model)
    ids, context = batch([6, 4], 2)
    model(ids, context)
    shifted = torch.cat([ids[1:, 2:], torch.zeros(1, 3, dtype=torch.long)], 1)
    valid = torch.arange(7)[None] < 4
    model(shifted, RoutingContext(1, 7, valid=valid.reshape(-1)))
    model(
        torch.cat([ids[1:], ids[:1]]),
        RoutingContext(2, 6, valid=context.valid.view(2, 6).flip(0).reshape(-1)),
    )
    assert seen == [2]
    model(torch.cat([ids[:1], torch.full_like(ids[:1], 7)]), RoutingContext(2, 6))
    assert seen == [2, 1]


def test_its_work_has_no_graph_and_no_place_in_the_state():
    model = decoder([0, 4, 0, 4], "all")
    model.embed_tokens.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    model.keep_trunk()
    ids, context = batch([4, 4], 3)
    before = set(model.state_dict())
    model(ids, context).logits.sum().backward()
    assert set(model.state_dict()) == before
    assert model.layers[0].mlp.down_proj.weight.grad is None
    assert model.layers[1].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize(
    ("experts", "trainable"), [([4, 0, 0, 4], "routers"), ([0, 0, 4, 4], "all")]
)
def test_without_a_frozen_dense_layer_below_it_is_refused(experts: list[int], trainable: str):
    with pytest.raises(ValueError, match="keep_trunk=true: no frozen dense layer"):
        decoder(experts, trainable).keep_trunk()
