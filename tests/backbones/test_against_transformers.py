"""Renaming ``moe`` to ``mlp`` makes our weights those of Qwen3MoeForCausalLM."""

from functools import partial

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from routerlab.backbones.decoder import Decoder
from routerlab.routers.token_choice import TokenChoice


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("normalize_weights", [False, True])
def test_logits_equal_qwen3_moe(normalize_weights: bool, tie_embeddings: bool) -> None:
    ours = Decoder(
        partial(TokenChoice, top_k=2, normalize_weights=normalize_weights, init_std=0.5),
        vocab_size=19, d_model=16, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=12,
        num_experts=6, max_positions=32, qk_norm=True, tie_embeddings=tie_embeddings,
        rope_theta=500.0, rms_norm_eps=1e-5,
    )  # fmt: skip
    for name, parameter in ours.named_parameters():
        if "norm" in name:  # ones would hide a swapped or missing norm
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    torch.nn.init.normal_(ours.lm_head.weight, std=0.5)  # logits of size 1, not 0.1
    config = Qwen3MoeConfig(
        vocab_size=19, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, moe_intermediate_size=12, num_experts=6,
        num_experts_per_tok=2, norm_topk_prob=normalize_weights, max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-5,
        tie_word_embeddings=tie_embeddings, use_cache=False,
    )  # fmt: skip
    theirs = Qwen3MoeForCausalLM(config).eval()
    renamed = {}
    for name, value in ours.state_dict().items():
        name = name.replace(".moe.router.gate.", ".mlp.gate.").replace(".moe.", ".mlp.")
        renamed[name if name.startswith("lm_head") else f"model.{name}"] = value
    missing = theirs.load_state_dict(renamed, strict=False)
    assert missing.missing_keys == missing.unexpected_keys == []
    ids = torch.randint(19, (2, 32))
    with torch.no_grad():
        got, expected = ours(ids).logits, theirs(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
