"""Tiny checkpoints of transformers that our decoder can be, and decoders that they can be."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from routerlab.backbones.decoder import Decoder
from routerlab.routers.token_choice import TokenChoice
from tests.helpers.language_models import IDS, POSITIONS, VOCAB
from tests.helpers.moe_models import stirred

EXPERTS, LAYERS = 4, 3
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    "max_position_embeddings": POSITIONS, "num_experts_per_tok": 2, "initializer_range": 0.3,
    "moe_intermediate_size": 12, "rms_norm_eps": 1e-4, "use_cache": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, **IDS,
}  # fmt: skip
_GLM = {
    "n_routed_experts": EXPERTS, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "routed_scaling_factor": 1.5, "norm_topk_prob": True,
}  # fmt: skip
# name: family, what differs from `_COMMON`
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": EXPERTS}),
    "qwen2, no shared experts": (
        "qwen2_moe",
        {"num_experts": EXPERTS, "qkv_bias": False, "shared_expert_intermediate_size": 0},
    ),
    "qwen2, shared experts": (
        "qwen2_moe",
        {
            "num_experts": EXPERTS,
            "qkv_bias": False,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen3, dense layers": ("qwen3_moe", {"num_experts": EXPERTS, "mlp_only_layers": [0, 2]}),
    "qwen3, tied": (
        "qwen3_moe",
        {"num_experts": EXPERTS, "tie_word_embeddings": True, "norm_topk_prob": True},
    ),
    "glm4": (
        "glm4_moe",
        _GLM | {"n_shared_experts": 2, "use_qk_norm": True, "partial_rotary_factor": 1.0},
    ),
    "glm4, no shared experts": (
        "glm4_moe",
        _GLM | {"n_shared_experts": 0, "norm_topk_prob": False, "partial_rotary_factor": 1.0},
    ),
    "dots1": ("dots1", _GLM | {"n_shared_experts": 1}),
    "ernie": (
        "ernie4_5_moe",
        {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1},
    ),
    "ernie, no shared experts": (
        "ernie4_5_moe",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": 2,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "tie_word_embeddings": False,
        },
    ),
}


def tiny_checkpoint(name: str, seed: int = 0, **changes: Any) -> Any:
    """A model of `CHECKPOINTS` with random weights, none of them the ones or zeros it starts with,
    but for the gate of Qwen2's shared experts.
    """
    family, own = CHECKPOINTS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **copy.deepcopy(_COMMON | own | changes))
    )
    for layer in model.model.layers:
        if hasattr(layer.mlp, "shared_expert_gate"):
            torch.nn.init.zeros_(layer.mlp.shared_expert_gate.weight)
    return stirred(model)


def tiny_decoder(router: dict[str, Any] | None = None, make: Any = None, **changes: Any) -> Decoder:
    """Three layers of four experts with large gates, in evaluation mode; ``router`` are knobs of
    `TokenChoice`, ``make`` makes another one.
    """
    torch.manual_seed(0)
    knobs = {"top_k": 2, "init_std": 0.5} | (router or {})
    arguments: dict[str, Any] = {
        "vocab_size": VOCAB, "d_model": 16, "num_layers": LAYERS, "num_heads": 4, "head_dim": 6,
        "num_kv_heads": 2, "d_ff": 12, "num_experts": EXPERTS, "max_positions": 40,
        "rope_theta": 500.0, "rms_norm_eps": 1e-4,
    }  # fmt: skip
    decoder = Decoder(make or partial(TokenChoice, **knobs), **(arguments | changes))
    torch.nn.init.normal_(decoder.lm_head.weight, std=0.5)
    return stirred(decoder)


def edit_tensors(folder: Path, edit: Any) -> None:
    """Replaces the tensors of ``model.safetensors`` by what ``edit`` makes of their dict."""
    tensors: dict[str, Tensor] = edit(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def stacked_tensors(model: Any) -> dict[str, Tensor]:
    """A model's tensors by the names of its modules, which stack the experts."""
    tied = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    return {key: t.clone() for key, t in model.state_dict().items() if key not in tied}
