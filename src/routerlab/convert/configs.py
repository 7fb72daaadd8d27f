"""Configs of transformers: what one says of a model, and the one that says what a decoder is."""

from typing import Any

from routerlab.convert.families import FAMILIES, Anatomy, Family

# Classes whose blocks our decoder does not have, and which part of them.
_FOREIGN = {
    "olmoe": "query-key norm over the full width (ours is per head)",
    "deepseek_v2": "multi-head latent attention (MLA)",
    "deepseek_v3": "multi-head latent attention (MLA)",
    "gpt_oss": "attention sinks, biases, and a clamped, interleaved SwiGLU",
}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_BIASES = ("attention_bias", "qkv_bias", "use_bias", "mlp_bias")


def family_of(config: Any) -> Family:
    """The family of a config; ValueError, naming what it has that our decoder has not."""
    name = config.model_type
    if name in FAMILIES:
        return FAMILIES[name]
    if name in _FOREIGN:
        raise ValueError(
            f"{name} has {_FOREIGN[name]}, which our decoder has not; wrap the model as it is with "
            "backbone=hugging_face"
        )
    if not any(getattr(config, count, None) for count in _COUNTS):
        raise ValueError(
            f"{name} is a dense model, without experts; make a mixture of it with `routerlab "
            "upcycle`"
        )
    raise ValueError(
        f"model_type {name!r}: import knows {', '.join(FAMILIES)}; wrap the model as it is with "
        "backbone=hugging_face"
    )


def read_config(config: Any) -> tuple[Family, Anatomy]:
    """A config's family, and the decoder that it describes.

    Raises ValueError, naming the feature, if our decoder cannot be that.
    """
    family = family_of(config)
    if found := _features_we_lack(config):
        raise ValueError(f"{config.model_type} with {', '.join(found)}: our decoder has none of it")
    heads = config.num_attention_heads
    arguments = {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "dense_d_ff": None,
        "num_shared_experts": 0,
        "max_positions": config.max_position_embeddings,
        "qk_norm": False,
        "tie_embeddings": bool(config.tie_word_embeddings),
        "rope_theta": float(config.rope_parameters["rope_theta"]),
        "rms_norm_eps": config.rms_norm_eps,
    }
    own, law = family.read(config)
    if not any(own["num_experts"]):
        raise ValueError(
            f"{config.model_type} without a single MoE layer: a dense model; make a mixture of it "
            "with `routerlab upcycle`"
        )
    return family, Anatomy(arguments | own, law)


def write_config(family: Family, anatomy: Anatomy, tokenizer: Any = None) -> Any:
    """The config of the family's class that describes the same model, nothing left to defaults."""
    from transformers import AutoConfig

    a = anatomy.arguments
    values = {
        "vocab_size": a["vocab_size"],
        "hidden_size": a["d_model"],
        "num_hidden_layers": a["num_layers"],
        "num_attention_heads": a["num_heads"],
        "num_key_value_heads": a["num_kv_heads"],
        "head_dim": a["head_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": a["max_positions"],
        "rms_norm_eps": a["rms_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": a["rope_theta"]},
        "tie_word_embeddings": a["tie_embeddings"],
        "router_aux_loss_coef": 0.0,
        "attention_dropout": 0.0,
        "dtype": "float32",
    }
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    values |= {name: getattr(tokenizer, name, None) for name in tokens} | family.write(anatomy)
    return AutoConfig.for_model(family.name, **values)


def _features_we_lack(config: Any) -> list[str]:
    """Features of any config that our decoder has not, in words."""
    rope, found = config.rope_parameters, []
    if rope.get("rope_type", "default") != "default":
        found.append(f"rope scaling ({rope['rope_type']})")
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        found.append(f"partial rotary positions ({part})")
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window and window < config.max_position_embeddings and "sliding_attention" in kinds:
        found.append(f"a sliding window of {window} tokens")
    if config.hidden_act not in ("silu", "swish"):
        found.append(f"activation {config.hidden_act}")
    found += [f"biases ({name})" for name in _BIASES if getattr(config, name, False)]
    if noise := getattr(config, "router_jitter_noise", 0.0):
        found.append(f"jitter on the experts' input (router_jitter_noise={noise})")
    return found
