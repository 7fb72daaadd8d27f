"""Dense checkpoints become saved mixtures, with a certificate."""

import json
from pathlib import Path

import pytest
import torch

from routerlab.backbones.saved import load_decoder
from routerlab.convert.certificate import ConversionFailed
from routerlab.convert.upcycling import upcycle_model
from routerlab.core.config import ConfigError
from tests.convert.checkpoints import edit_tensors
from tests.helpers.language_models import VOCAB, save_tiny, tiny_llama

IDS = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("backbone.layers=1", "backbone.num_experts=8"),
        ("backbone.slices=2", "router.top_k=4", "backbone.num_experts=4"),
        ("router=deepseek_v3", "router.route_scale=1.0", "router.num_groups=1",
         "router.groups_per_token=1"),
    ],
)  # fmt: skip
def test_logits_are_those_of_the_dense_model(words: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny_llama()
    save_tiny(tmp_path / "dense", model)
    certificate = upcycle_model(str(tmp_path / "dense"), tmp_path / "moe", words)
    assert certificate.failures == []
    decoder = load_decoder(tmp_path / "moe")
    with torch.no_grad():
        got, expected = decoder(IDS), model(IDS).logits
    torch.testing.assert_close(got.logits, expected, rtol=1e-5, atol=2e-5)
    assert len(got.router_outputs) == (1 if "backbone.layers=1" in words else 2)
    assert decoder.tokenizer is not None
    written = json.loads((tmp_path / "moe" / "certificate.json").read_text())
    assert (written["command"], written["family"]) == ("upcycle", "llama")
    assert sum(len(move["sources"]) for move in written["moves"]) == written["source_keys"]


@pytest.mark.parametrize(
    "words", [("router.normalize_weights=false",), ("backbone.noise_std=0.5",)]
)
def test_other_logits_fail(words: tuple[str, ...], tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense")
    with pytest.raises(ConversionFailed, match="logits differ"):
        upcycle_model(str(tmp_path / "dense"), tmp_path / "moe", words)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("lost", "more", "told"),
    [
        (None, "model.layers.1.mlp.extra.weight", "unexpected_keys: .*mlp.extra"),
        ("model.norm.weight", None, "missing_keys: model.norm"),
    ],
)
def test_what_is_dropped_or_missing_fails(
    lost: str | None, more: str | None, told: str, tmp_path: Path
) -> None:
    dense = save_tiny(tmp_path / "dense")
    added = {} if more is None else {more: torch.ones(3)}
    edit_tensors(dense, lambda t: {k: x for k, x in t.items() if k != lost} | added)
    with pytest.raises(ConversionFailed, match=told):
        upcycle_model(str(dense), tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_words_of_other_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'data=files': must be of backbone, router or balancer"):
        upcycle_model("smollm2", tmp_path / "moe", ["data=files"])


def test_the_generator_is_put_back(tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    upcycle_model(str(tmp_path / "dense"), tmp_path / "one", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    upcycle_model(str(tmp_path / "dense"), tmp_path / "two", seed=2)
    gates = [
        load_decoder(tmp_path / name).moe_layers["layers.00.moe"].router.gate.weight
        for name in ("one", "two")
    ]
    assert not torch.equal(*gates)
