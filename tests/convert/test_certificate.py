"""What a certificate calls a failure."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from routerlab.convert.certificate import Certificate, ConversionFailed, Move
from routerlab.convert.compare import Seen, compare, random_tokens, see_decoder, see_transformers
from tests.convert.checkpoints import tiny_checkpoint, tiny_decoder
from tests.helpers.language_models import VOCAB, tiny_llama


def certificate(*moves: Move, source: str = "ab", target: str = "AB") -> Certificate:
    return Certificate(
        "import", "there", "here", "mixtral", list(moves), list(source), list(target)
    )


A, B = Move(("a",), ("A",), "renamed"), Move(("b",), ("B",), "renamed")


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (certificate(A, B), None),
        (certificate(Move(("a", "b"), ("A", "B"), "stacked")), None),
        (certificate(A, B, Move((), ("C",), "zeros"), target="ABC"), None),
        (certificate(A), "source tensors not used: b"),
        (certificate(A, target="AB", source="a"), "target tensors not written: B"),
        (certificate(A, B, source="a"), "source tensors missing: b"),
        (certificate(A, B, A), "source tensors used more than once: a"),
        (certificate(A, B, Move((), ("A",), "zeros")), "target tensors written more than once: A"),
        (certificate(A, source="abcdefg", target="A"), "not used: b, c, d and 3 more"),
    ],
)
def test_every_tensor_goes_one_way(found: Certificate, why: str | None) -> None:
    if why is None:
        found.check()
        assert found.failures == []
        return
    assert why in "; ".join(found.failures)
    with pytest.raises(ConversionFailed) as error:
        found.check()
    assert error.value.certificate is found


def seen(scale: float = 1.0, picks: tuple[int, ...] = (0, 1)) -> Seen:
    x = torch.full((1, 2, 3), scale)
    return Seen([x], {0: torch.tensor([[0, 1], picks])}, x)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (seen(), []),
        (seen(1 + 5e-5), []),
        (seen(1 + 2e-4), ["layer 0: hidden states differ", "logits differ by 0.0002 of a token"]),
        (seen(float("nan")), ["layer 0: hidden states differ by nan", "logits differ by nan"]),
        (seen(picks=(0, 2)), ["layer 0: 50.0% of the tokens use other experts"]),
        (Seen([torch.ones(1, 2, 3)], {}, torch.ones(1, 2, 3)), []),
    ],
)
def test_differences_beyond_rounding_fail(target: Seen, why: list[str]) -> None:
    found = compare(seen(), target).failures
    assert len(found) == len(why)
    assert all(said.startswith(expected) for said, expected in zip(found, why, strict=True))


def test_what_is_seen_of_a_model_of_transformers() -> None:
    model, tokens = tiny_checkpoint("qwen3, dense layers"), random_tokens(VOCAB, 9, seed=3)
    assert tokens.shape == (4, 9)
    found = see_transformers(model, tokens)
    assert [tuple(x.shape) for x in found.hidden] == [(4, 9, 16)] * 3
    assert {layer: tuple(x.shape) for layer, x in found.picks.items()} == {1: (36, 2)}
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True, output_router_logits=True)
    torch.testing.assert_close(found.hidden[0], expected.hidden_states[1], rtol=0, atol=0)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
    best = expected.router_logits[0].topk(2).indices.sort().values
    assert torch.equal(found.picks[1], best)
    assert see_transformers(tiny_llama(), tokens).picks == {}


def test_what_is_seen_of_a_decoder() -> None:
    decoder = tiny_decoder(num_experts=[4, 0, 4])
    tokens = random_tokens(VOCAB, 40, seed=3)
    found = see_decoder(decoder, tokens)
    with torch.no_grad():
        expected = decoder(tokens)
    assert torch.equal(found.logits, expected.logits)
    records = expected.router_outputs
    assert list(found.picks) == [0, 2]
    picks = records["layers.02.moe"].expert_indices.view(-1, 2).sort().values
    assert torch.equal(found.picks[2], picks)
    assert not list(decoder.layers[0]._forward_hooks)


def test_it_is_written_and_shown(tmp_path: Path) -> None:
    found = certificate(A)
    found.comparison = compare(seen(), seen())
    found.notes.append("of training alone")
    found.write(tmp_path)
    written = json.loads((tmp_path / "certificate.json").read_text())
    assert written["moves"] == [{"sources": ["a"], "targets": ["A"], "how": "renamed"}]
    assert written["failures"] == found.failures
    assert written["comparison"]["agreement"] == {"0": 1.0}
    console = Console(record=True, width=100)
    found.show(console)
    said = console.export_text()
    assert "import (mixtral): FAILED" in said
    assert "FAILED: source tensors not used: b" in said
    assert "note: of training alone" in said
    certified = certificate(A, B)
    certified.show(console)
    assert "import (mixtral): certified" in console.export_text()
