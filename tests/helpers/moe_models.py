"""Tiny mixtures of experts of transformers, one of each family, with routers that mean it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from routerlab.backbones.hugging_face import HuggingFaceMoE
from routerlab.core.routing import RouterOutput, RoutingContext
from tests.helpers.language_models import IDS, POSITIONS, VOCAB

EXPERTS, TOP_K, WIDTH = 8, 2, 32
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.2,
    **IDS,
}
_DEEPSEEK = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}
_GROUPS = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": EXPERTS},
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "deepseek_v3": _DEEPSEEK
    | _GROUPS
    | _MLA
    | {"moe_intermediate_size": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    "glm4_moe": _DEEPSEEK | {"moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True},
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "head_dim": 8,
        "sliding_window": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}  # of those that have dense layers one is dense; the others are routed
SIGMOID = ("deepseek_v3", "glm4_moe")  # families whose scores are no softmax
ROUTED = {"qwen2_moe": [0, 2], "qwen3_moe": [1, 2], "deepseek_v3": [1, 2], "glm4_moe": [1, 2]}


def routed_layers(family: str) -> list[str]:
    """Names of the records of a tiny model of this family."""
    return [f"layers.{number:02d}.moe" for number in ROUTED.get(family, [0, 1, 2])]


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Three layers of width 32, 8 experts of which 2 are used, 64 tokens."""
    return AutoConfig.for_model(family, **(_SIZES | FAMILIES[family] | changes))


def tiny_moe(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model of `tiny_config` in evaluation mode."""
    torch.manual_seed(seed)
    return stirred(AutoModelForCausalLM.from_config(tiny_config(family, **changes)))


def stirred(model: Any) -> Any:
    """The model without ones and zeros, which hide mistakes."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif name.endswith(("bias", "sinks")):
            nn.init.normal_(tensor, std=0.2)
    return model.eval()


def gates(model: Any) -> list[Any]:
    """The routers of transformers, in the order of depth."""
    return [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]


def wrapped(
    family: str, seed: int = 0, changes: dict[str, Any] | None = None, **options: Any
) -> Any:
    """The model of `tiny_moe`, wrapped."""
    torch.manual_seed(seed)
    model = HuggingFaceMoE(config=tiny_config(family, **(changes or {})), **options)
    stirred(model.model)
    return model


def some_ids(rows: int = 3, length: int = 9) -> Tensor:
    """Random tokens other than the special ones."""
    return torch.randint(3, VOCAB, (rows, length))


def ragged(left: bool) -> tuple[Tensor, RoutingContext]:
    """Three sequences of 9, 6 and 1 tokens."""
    places = torch.arange(8, -1, -1) if left else torch.arange(9)
    valid = places < torch.tensor([9, 6, 1])[:, None]
    return some_ids(), RoutingContext(3, 9, valid=valid.flatten())


def heard(model: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the routers of a plain model return from now on."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for gate in gates(model):
        gate.register_forward_hook(lambda gate, args, out: found.append(out))
    return found


def same_records(got: dict[str, RouterOutput], wanted: dict[str, RouterOutput]) -> None:
    """Records of the same names, logits and picks."""
    assert list(got) == list(wanted)
    for name, record in got.items():
        torch.testing.assert_close(
            record.router_logits, wanted[name].router_logits, rtol=1e-5, atol=1e-5
        )
        assert torch.equal(record.expert_indices, wanted[name].expert_indices)
