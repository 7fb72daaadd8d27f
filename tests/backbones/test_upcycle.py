"""Mixtures of experts made of dense models: equal logits at the start, and what is refused."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from routerlab.backbones.base_models import load_base
from routerlab.backbones.upcycle import Written, upcycle, upcycled
from routerlab.routers.build import build_router
from routerlab.routers.token_choice import TokenChoice
from tests.helpers.language_models import (
    IDS,
    POSITIONS,
    VOCAB,
    save_tiny,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen3,
)
from tests.helpers.moe_models import tiny_moe

SHARED = Path(os.environ.get("ROUTERLAB_CACHE", Path.home() / ".cache" / "routerlab"))
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False, "initializer_range": 0.2, **IDS,
}  # fmt: skip


def mistral(**changes: Any) -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES | {"sliding_window": None} | changes)).eval()


def qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


def choice(top_k: int = 2, **changes: Any) -> Any:
    return partial(TokenChoice, top_k=top_k, init_std=1.0, **changes)


def logits(model: Any) -> tuple[Tensor, Tensor]:
    """Random tokens, and the dense model's logits for them."""
    ids = torch.randint(VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ids, model(input_ids=ids).logits


MODELS = {
    "llama": tiny_llama,
    "llama_three_layers": partial(tiny_llama, num_hidden_layers=3, tie_word_embeddings=False),
    "llama_head_dim": partial(tiny_llama, head_dim=12),
    "qwen3": tiny_qwen3,
    "mistral": mistral,
    "mistral_wide_window": partial(mistral, sliding_window=POSITIONS),
}
FORMS: dict[str, dict[str, Any]] = {
    "copies": {"router": choice(2), "num_experts": 4},
    "all_copies": {"router": choice(3), "num_experts": 3},
    "sigmoid": {"router": choice(2, score_fn="sigmoid"), "num_experts": 4},
    "last": {"router": choice(2), "num_experts": 4, "layers": 1},
    "first": {"router": choice(2), "num_experts": 4, "layers": [0]},
    "split": {"router": choice(4), "num_experts": 12, "slices": 4},
    "split_two": {"router": choice(4), "num_experts": 8, "slices": 2, "layers": 1},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_the_dense_model(name: str, form: str) -> None:
    model = MODELS[name]()
    ids, expected = logits(model)
    decoder, written = upcycle(model, **FORMS[form])
    with torch.no_grad():
        out = decoder.eval()(ids)
    assert expected.std() > 0.3
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=2e-5)
    sources = [source for entry in written for source in entry.sources]
    assert sorted(sources) == sorted(dict(model.named_parameters()))
    assert sorted(entry.target for entry in written) == sorted(dict(decoder.named_parameters()))
    experts, last = FORMS[form]["num_experts"], model.config.num_hidden_layers - 1
    numbers = {"last": [last], "split_two": [last], "first": [0]}.get(form, list(range(last + 1)))
    assert list(out.router_outputs) == [f"layers.{number:02d}.moe" for number in numbers]
    for record in out.router_outputs.values():
        assert record.num_experts == experts
        assert record.tokens_per_expert.count_nonzero() == experts  # unequal rows, many experts


def test_what_becomes_of_each_tensor() -> None:
    model = tiny_llama(num_hidden_layers=1)
    written = upcycle(model, choice(4), num_experts=8, slices=4)[1]
    found = {entry.target: entry for entry in written}
    mlp, moe = "model.layers.0.mlp.", "layers.0.moe."
    both = (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
    for entry in (
        Written("embed_tokens.weight", ("model.embed_tokens.weight",), "renamed"),
        Written(f"{moe}experts.gate_up_proj", both, "stacked, cut in 4 slices, 2 copies"),
        Written(
            f"{moe}experts.down_proj",
            (f"{mlp}down_proj.weight",),
            "2 copies, cut in 4 slices, times 4",
        ),
        Written(f"{moe}router.gate.weight", (), "fresh, equal for the slices of a copy"),
    ):
        assert found[entry.target] == entry
    dense = upcycle(tiny_llama(), choice(2), num_experts=4, layers=[1])[1]
    stacked = next(entry for entry in dense if entry.target == "layers.0.mlp.gate_up_proj.weight")
    assert stacked == Written(stacked.target, both, "stacked")


def test_slices_of_a_copy_are_picked_together() -> None:
    model = tiny_llama()
    ids, _ = logits(model)
    decoder, _ = upcycle(model, choice(4), num_experts=12, slices=4)
    for record in decoder.eval()(ids).router_outputs.values():
        copies = record.expert_indices.view(-1, 4) // 4
        assert (copies == copies[:, :1]).all()
        assert record.expert_indices.view(-1, 4).sort(1).values.diff().eq(1).all()
    experts: Any = decoder.layers[0].moe.experts
    dense: Any = model.model.layers[0].mlp
    assert torch.equal(experts.gate_up_proj[6, :12], dense.gate_proj.weight[24:36])
    assert torch.equal(experts.gate_up_proj[6, 12:], dense.up_proj.weight[24:36])
    assert torch.equal(experts.down_proj[6], 4 * dense.down_proj.weight[:, 24:36])


def test_weights_that_do_not_sum_to_one_change_the_logits() -> None:
    model = tiny_llama()
    ids, expected = logits(model)
    decoder, _ = upcycle(model, choice(2, normalize_weights=False), num_experts=4)
    with torch.no_grad():
        assert (decoder.eval()(ids).logits - expected).abs().max() > 0.1


def test_noise_tells_copies_apart_and_is_the_same_for_the_same_seed() -> None:
    model = tiny_llama()
    ids, expected = logits(model)
    noisy = [
        upcycle(model, choice(), num_experts=4, noise_std=0.1, seed=seed)[0] for seed in (1, 1, 2)
    ]
    first, again, other = (decoder.layers[1].moe.experts for decoder in noisy)  # type: ignore[union-attr]
    assert torch.equal(first.gate_up_proj, again.gate_up_proj)
    assert not torch.equal(first.gate_up_proj, other.gate_up_proj)
    dense: Any = model.model.layers[1].mlp
    for got, weight in (
        (first.down_proj, dense.down_proj.weight),
        (first.gate_up_proj, torch.cat([dense.gate_proj.weight, dense.up_proj.weight])),
    ):
        noise = (got - weight).detach()
        assert float(noise.std() / weight.detach().std()) == pytest.approx(0.1, rel=0.1)
        assert not torch.equal(noise[0], noise[1])
    with torch.no_grad():
        assert (noisy[0].eval()(ids).logits - expected).abs().max() > 1e-3
    assert torch.equal(noisy[0].embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_model_from_a_directory(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "llama")
    ids, expected = logits(tiny_llama())
    decoder = upcycled(
        str(folder), tmp_path, choice(), num_experts=4, trainable="routers", trainable_layers=1
    )
    assert not decoder.training
    assert decoder.tokenizer("abc")["input_ids"] == [3, 4, 5]
    assert (decoder.vocab_size, decoder.max_positions) == (VOCAB, POSITIONS)
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids).logits, expected, rtol=1e-5, atol=2e-5)
    dense = sum(p.numel() for p in tiny_llama().parameters())
    network, gate = 3 * 32 * 48, 4 * 32
    assert decoder.count_parameters() == {
        "total": dense + 2 * (3 * network + gate),
        "active": dense + 2 * (network + gate),
        "trainable": gate,
        "experts": 8,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slices": 3}, r"slices=3: must divide num_experts=4"),
        ({"slices": 0}, r"slices=0: must be at least 1"),
        ({"slices": 5, "num_experts": 5}, r"slices=5: must divide intermediate_size=48"),
        ({"slices": 4}, r"slices=4: must divide router.top_k=2, to pick whole copies"),
        ({"num_experts": 0}, r"num_experts=0: must be at least 1"),
        ({"noise_std": -0.1}, r"noise_std=-0.1: must be at least 0"),
        ({"layers": 3}, r"layers=3: must be from 1 to the 2 layers"),
        ({"layers": [1, 1]}, r"layers=\[1, 1\]: must be different layers, of \[0, 1\]"),
        ({"layers": [2]}, r"layers=\[2\]: must be different layers, of \[0, 1\]"),
        ({"dispatch": "fast"}, r"dispatch='fast': must be one of"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_llama(), **{"router": choice(), "num_experts": 4} | changes)


@pytest.mark.parametrize("name", ["hash", "top_p"])
def test_slices_need_a_gate_that_picks_a_fixed_number(name: str) -> None:
    with pytest.raises(ValueError, match=r"slices=2: router .* picks no fixed number of experts"):
        upcycle(tiny_llama(), partial(build_router, name), num_experts=4, slices=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_gpt2, r"GPT2LMHeadModel\): can upcycle llama, mistral, qwen2, qwen3, not gpt2"),
        (
            qwen2,
            r"no place for 6 of its tensors, such as model\.layers\.0\.self_attn\.k_proj\.bias",
        ),
        (partial(tiny_llama, attention_bias=True), r"has attention_bias, which a Decoder does not"),
        (partial(tiny_llama, mlp_bias=True), r"has mlp_bias, which"),
        (partial(tiny_llama, hidden_act="gelu"), r"has hidden_act='gelu', which"),
        (partial(mistral, sliding_window=16), r"has sliding_window=16, which"),
        (
            partial(
                tiny_llama,
                rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            ),
            r"has rope_type='linear', which",
        ),
        (partial(tiny_moe, "mixtral"), r"mixture of experts already; .*`routerlab import`"),
    ],
)
def test_models_that_a_decoder_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(make(), choice(), num_experts=4)


def test_directories_that_hold_no_whole_model(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"cache_dir": tmp_path, "router": choice(), "num_experts": 4}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter; give its base model"):
        upcycled(str(adapter), **arguments)
    folder = save_tiny(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short or broken"):
        upcycled(str(folder), **arguments)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has config.json but no weights"):
        upcycled(str(folder), **arguments)


@pytest.mark.parametrize(("num_experts", "top_k", "slices"), [(4, 2, 1), (16, 4, 4)])
def test_a_real_model(num_experts: int, top_k: int, slices: int) -> None:
    model, tokenizer = load_base("smollm2", SHARED, torch.float32)
    texts = ["The capital of France is Paris and the capital of Italy is Rome", "7 + 12 = 19"]
    ids = torch.tensor([tokenizer(text)["input_ids"][:6] for text in texts])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    shape: dict[str, Any] = {"num_experts": num_experts, "slices": slices, "layers": 2}
    decoder, _ = upcycle(model, partial(TokenChoice, top_k=top_k), **shape)
    with torch.no_grad():
        out = decoder.eval()(ids)
    assert expected.abs().max() > 10
    assert (out.logits - expected).abs().max() <= 1e-3
    assert list(out.router_outputs) == ["layers.28.moe", "layers.29.moe"]
    for record in out.router_outputs.values():
        assert record.tokens_per_expert.sum() == ids.numel() * top_k
