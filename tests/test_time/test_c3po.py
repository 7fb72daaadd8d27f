"""Neighbour mixing: whose routing is mixed in, where, and how much."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.analysis.neighbour_bank import NeighbourBank
from routerlab.backbones.hugging_face import HuggingFaceMoE
from routerlab.core.routing import RoutingContext
from routerlab.test_time.c3po import NeighbourMixing, mixed
from routerlab.test_time.generation import generate
from routerlab.test_time.plug_in import edited, rerouting
from tests.helpers.language_models import VOCAB, tiny_tokenizer
from tests.helpers.models import tiny_decoder
from tests.helpers.moe_models import tiny_config

LAYERS = {"layers.00.moe": 4, "layers.01.moe": 4}


def length_of(texts: Sequence[str]) -> Tensor:
    """An embedder that knows a text by its length alone."""
    return torch.tensor([[len(text) / 10] for text in texts])


def model() -> Any:
    found = tiny_decoder(vocab_size=VOCAB).eval()
    found.tokenizer = tiny_tokenizer()
    return found


def bank(correct: Sequence[bool] = (True, True, False), **changes: Any) -> NeighbourBank:
    """Prompts of 4, 6 and 5 letters; the last was answered wrongly."""
    known: dict[str, Any] = {"layers": LAYERS, "token": "last1", "fingerprint": {}}
    routing = torch.tensor(
        [
            [0.7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.7],
            [0.1, 0.7, 0.1, 0.1, 0.1, 0.1, 0.7, 0.1],
            [0.1, 0.1, 0.7, 0.1, 0.1, 0.7, 0.1, 0.1],
        ]
    )
    embeddings = torch.tensor([[0.4], [0.6], [0.5]])
    known |= {"embeddings": embeddings, "routing": routing, "correct": torch.tensor(correct)}
    return NeighbourBank(**(known | changes))


def questions() -> tuple[dict[str, Tensor], RoutingContext]:
    """Prompts of 5 and 3 letters, each with an answer of two, padded on the left."""
    ids, prompt = torch.full((2, 7), 1), torch.zeros(2, 7, dtype=torch.bool)
    ids[0], ids[1, 2:] = 5, 6
    prompt[0, :5], prompt[1, 2:5] = True, True
    valid = ids != 1
    return {"input_ids": ids}, RoutingContext(2, 7, valid=valid.flatten(), prompt=prompt.flatten())


def mixing(**knobs: Any) -> NeighbourMixing:
    plug_in = NeighbourMixing(**knobs)
    plug_in.use_bank(bank(), length_of)
    return plug_in


def test_a_mixture_has_its_logits() -> None:
    z, neighbours = torch.randn(3, 5), torch.rand(3, 5).softmax(-1)
    alpha = torch.tensor([[0.0], [0.3], [1.0]])
    wanted = (1 - alpha) * z.softmax(-1) + alpha * neighbours
    found = mixed(z, neighbours, alpha)
    torch.testing.assert_close(found.softmax(-1), wanted)
    assert torch.equal(found[0], z[0])
    scores = z.sigmoid()
    found = mixed(z, neighbours, 0.5 * torch.ones(3, 1), "sigmoid").sigmoid()
    share = 0.5 * scores / scores.sum(1, keepdim=True) + 0.5 * neighbours
    torch.testing.assert_close(found, share * scores.sum(1, keepdim=True))


def test_the_last_prompt_token_takes_the_neighbours_routing() -> None:
    decoder, (batch, context) = model(), questions()
    plain = decoder(batch["input_ids"], context).router_outputs
    with rerouting(mixing(k=1, alpha=1.0), decoder, batch, context):
        moved = decoder(batch["input_ids"], context).router_outputs
    first = moved["layers.00.moe"].router_probs
    near = bank().routing[:, :4].double()
    # The wrong one, of just 5 letters, is no neighbour: one of 4 or 6 is, alike near.
    assert any(torch.allclose(first[4], near[row], atol=1e-6) for row in (0, 1))
    torch.testing.assert_close(first[11], near[0], atol=1e-6, rtol=0)
    others = [t for t in range(14) if t not in (4, 11)]
    assert torch.equal(first[others], plain["layers.00.moe"].router_probs[others])


def test_neighbours_are_weighted_by_the_kernel() -> None:
    decoder, (batch, context) = model(), questions()
    plain = decoder(batch["input_ids"], context).router_outputs["layers.00.moe"]
    with rerouting(mixing(alpha=0.25), decoder, batch, context):
        moved = decoder(batch["input_ids"], context).router_outputs["layers.00.moe"]
    near = bank().routing[:2, :4].double()
    wanted = 0.75 * plain.router_probs[4] + 0.25 * near.mean(0)
    torch.testing.assert_close(moved.router_probs[4], wanted, atol=1e-6, rtol=0)
    similar = torch.exp(-torch.tensor([0.01, 0.09], dtype=torch.float64) / (2 * 0.4**2))
    weights = similar / similar.sum()
    wanted = 0.75 * plain.router_probs[11] + 0.25 * (weights @ near)
    torch.testing.assert_close(moved.router_probs[11], wanted, atol=1e-6, rtol=0)


def test_sigmoids_that_reach_their_bound_keep_their_proportions() -> None:
    z, neighbours = torch.full((1, 8), 1.0), torch.tensor([[0.86, *[0.02] * 7]])
    found = mixed(z, neighbours, torch.full((1, 1), 0.9), "sigmoid").sigmoid()
    wanted = 0.1 / 8 + 0.9 * neighbours
    assert float(found.max()) == pytest.approx(0.999)
    torch.testing.assert_close(found / found.sum(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "glm4_moe"])
def test_wrapped_models_mix_by_their_own_scores(family: str) -> None:
    torch.manual_seed(0)
    wrapped = HuggingFaceMoE(config=tiny_config(family), trainable="none").eval()
    wrapped.tokenizer = tiny_tokenizer()
    name, (batch, context) = wrapped.layer_names[-1], questions()
    near = torch.full((1, 8), 0.1)
    near[0, 6] = 0.3
    known = bank((True,), embeddings=torch.zeros(1, 1), routing=near, layers={name: 8})
    plug_in = NeighbourMixing(alpha=0.5)
    plug_in.use_bank(known, length_of)
    plain = wrapped(batch["input_ids"], context).router_outputs[name].router_probs
    with rerouting(plug_in, wrapped, batch, context):
        moved = wrapped(batch["input_ids"], context).router_outputs[name].router_probs
    wanted = 0.5 * plain[[4, 11]] + 0.5 * near
    torch.testing.assert_close(moved[[4, 11]], wanted, atol=1e-5, rtol=0)


def test_a_prompt_without_neighbours_stays_as_it_is() -> None:
    decoder, (batch, context) = model(), questions()
    plain = decoder(batch["input_ids"], context).logits
    plug_in = mixing(kind="ball", epsilon=0.999, sigma=0.01)
    with rerouting(plug_in, decoder, batch, context):
        assert torch.equal(decoder(batch["input_ids"], context).logits, plain)
    assert plug_in.cost.seconds > 0


def test_generated_tokens_are_left_alone() -> None:
    decoder, (batch, context) = model(), questions()
    edit, logits = mixing().adapt(decoder, batch, context), torch.zeros(2, 4)
    assert edit("layers.00.moe", logits) is logits
    longer = edit("layers.00.moe", torch.zeros(2 * 9, 4))  # the text read again, two tokens on
    assert longer.any(1).nonzero().flatten().tolist() == [4, 9 + 4]


def test_a_cache_says_what_full_passes_say() -> None:
    torch.manual_seed(0)
    wrapped = HuggingFaceMoE(config=tiny_config("olmoe"), trainable="none").eval()
    wrapped.tokenizer = tiny_tokenizer()
    layers = dict.fromkeys(wrapped.layer_names, 8)
    known = bank((True,), embeddings=torch.zeros(1, 1), layers=layers,
                 routing=torch.eye(8)[[6, 1, 3]].view(1, -1))  # fmt: skip
    plug_in = NeighbourMixing(alpha=0.9)
    plug_in.use_bank(known, length_of)
    ids = torch.tensor([[1, 1, 7, 9, 8], [12, 5, 6, 11, 4]])
    valid = torch.tensor([[False, False, True, True, True], [True] * 5])
    found = generate(wrapped, ids, valid, 6, plug_in)
    context = RoutingContext(2, 5, valid=valid.flatten(), prompt=valid.flatten())
    edit = plug_in.adapt(wrapped, {"input_ids": ids}, context)
    for _ in range(6):
        told = RoutingContext(*ids.shape, valid=valid.flatten())
        with torch.no_grad(), edited(wrapped, edit):
            logits = wrapped(ids, told, logits_to_keep=1).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        valid = torch.cat([valid, valid.new_ones(2, 1)], dim=1)
    assert torch.equal(found, ids)


def test_what_it_needs() -> None:
    decoder, (batch, context) = model(), questions()
    with pytest.raises(ValueError, match="there is none; call use_bank first"):
        NeighbourMixing().adapt(decoder, batch, context)
    with pytest.raises(ValueError, match="is of token 'first1'; must be of 'last1'"):
        NeighbourMixing().use_bank(bank(token="first1"), length_of)
    with pytest.raises(ValueError, match="no sample in it is answered rightly"):
        NeighbourMixing().use_bank(bank((False, False, False)), length_of)
    plug_in = NeighbourMixing()
    plug_in.use_bank(bank(layers={"layers.00.moe": 4, "layers.07.moe": 4}), length_of)
    with pytest.raises(ValueError, match="4 experts in layers.07.moe; not this"):
        plug_in.adapt(decoder, batch, context)
    with pytest.raises(ValueError, match="Decoder came with no tokenizer"):
        mixing().adapt(tiny_decoder(vocab_size=VOCAB), batch, context)
    with pytest.raises(ValueError, match="alpha=2: must be at least 0 and at most 1"):
        NeighbourMixing(alpha=2)
    with pytest.raises(ValueError, match="kind='random'"):
        NeighbourMixing(kind="random")
