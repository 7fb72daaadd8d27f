"""The MoE classes of transformers that our decoder can be, and what each of them can hold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from routerlab.convert.law import Law

Arguments = dict[str, Any]  # of `Decoder`, router and experts aside


@dataclass(frozen=True)
class Anatomy:
    """What a decoder is made of: its arguments (``num_experts`` by layer) and its routers' law."""

    arguments: Arguments
    law: Law

    @property
    def features(self) -> frozenset[str]:
        """What not every class of transformers can hold, in words."""
        counts, law = self.arguments["num_experts"], self.law
        first = next(i for i, count in enumerate(counts) if count)
        found = {
            f"{law.score_fn} scores": True,
            "weights that do not sum to 1": not law.normalize_weights,
            "route_scale": law.route_scale != 1,
            "a bias on the choice": law.biased,
            "groups of experts": law.num_groups > 1,
            "groups of experts without a bias": law.num_groups > 1 and not law.biased,
            "query-key norm": self.arguments["qk_norm"],
            "attention without query-key norm": not self.arguments["qk_norm"],
            "shared experts": self.arguments["num_shared_experts"] > 0,
            "dense first layers": first > 0,
            "dense layers after MoE layers": 0 in counts[first:],
        }
        return frozenset(feature for feature, present in found.items() if present)


@dataclass(frozen=True)
class Family:
    """A class of transformers.

    Args:
        name: its ``model_type``.
        can: the features (`Anatomy.features`) that it can hold.
        read: the arguments and the law that its config gives, besides those of every config.
        write: the same backwards.
        block: the MoE's name in the files of the hub.
        experts: its names of an expert's gate, up and down projections there.
        shared: the name of the shared experts; None: it has none.
        empty_shared: without shared experts it has them still, of width 0.
        gated_shared: the shared experts' output is multiplied by a learned sigmoid.
        bias: the name of the bias on the choice; None: it has none.
        interleaved: coordinates that rotary positions turn together are neighbours.
    """

    name: str
    can: frozenset[str]
    read: Callable[[Any], tuple[Arguments, Law]]
    write: Callable[[Anatomy], dict[str, Any]]
    block: str = "mlp"
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str | None = None
    empty_shared: bool = True
    gated_shared: bool = False
    bias: str | None = None
    interleaved: bool = False


def fitting_family(anatomy: Anatomy, wanted: str = "auto") -> Family:
    """The first family (or the ``wanted`` one) that holds everything; ValueError, naming what does
    not fit, if there is none.
    """
    if wanted != "auto" and wanted not in FAMILIES:
        raise ValueError(f"family={wanted!r}: must be auto or one of {', '.join(FAMILIES)}")
    asked = FAMILIES.values() if wanted == "auto" else [FAMILIES[wanted]]
    lacks = {family.name: sorted(anatomy.features - family.can) for family in asked}
    for family in asked:
        if not lacks[family.name]:
            return family
    told = "; ".join(f"{name} has no place for {', '.join(what)}" for name, what in lacks.items())
    raise ValueError(f"no class of transformers holds this model: {told}")


def _read_mixtral(config: Any) -> tuple[Arguments, Law]:
    experts = [config.num_local_experts] * config.num_hidden_layers
    law = Law(config.num_experts_per_tok)
    return {"d_ff": config.intermediate_size, "num_experts": experts}, law


def _write_mixtral(anatomy: Anatomy) -> dict[str, Any]:
    return {
        "intermediate_size": anatomy.arguments["d_ff"],
        "num_local_experts": max(anatomy.arguments["num_experts"]),
        "num_experts_per_tok": anatomy.law.top_k,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


def _read_qwen(config: Any) -> tuple[Arguments, Law]:
    experts = [
        config.num_experts
        if i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0
        else 0
        for i in range(config.num_hidden_layers)
    ]
    arguments = {
        "d_ff": config.moe_intermediate_size,
        "dense_d_ff": config.intermediate_size,
        "num_experts": experts,
    }
    law = Law(config.num_experts_per_tok, normalize_weights=bool(config.norm_topk_prob))
    return arguments, law


def _read_qwen2(config: Any) -> tuple[Arguments, Law]:
    arguments, law = _read_qwen(config)
    return arguments | _shared(config.shared_expert_intermediate_size, arguments["d_ff"]), law


def _read_qwen3(config: Any) -> tuple[Arguments, Law]:
    arguments, law = _read_qwen(config)
    return arguments | {"qk_norm": True}, law


def _write_qwen3(anatomy: Anatomy) -> dict[str, Any]:
    a = anatomy.arguments
    return {
        "num_experts": max(a["num_experts"]),
        "num_experts_per_tok": anatomy.law.top_k,
        "norm_topk_prob": anatomy.law.normalize_weights,
        "moe_intermediate_size": a["d_ff"],
        "intermediate_size": a["dense_d_ff"] or a["d_ff"],
        "mlp_only_layers": [i for i, count in enumerate(a["num_experts"]) if not count],
        "decoder_sparse_step": 1,
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _write_qwen2(anatomy: Anatomy) -> dict[str, Any]:
    a = anatomy.arguments
    width = a["num_shared_experts"] * a["d_ff"]
    own = {"shared_expert_intermediate_size": width, "qkv_bias": False}
    return _write_qwen3(anatomy) | own


def _read_glm4(config: Any) -> tuple[Arguments, Law]:
    """GLM-4-MoE, and dots1, whose queries and keys are always normalised."""
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    arguments = {
        "d_ff": config.moe_intermediate_size,
        "dense_d_ff": config.intermediate_size,
        "num_experts": [0] * dense + [config.n_routed_experts] * (config.num_hidden_layers - dense),
        "num_shared_experts": config.n_shared_experts or 0,
        "qk_norm": getattr(config, "use_qk_norm", True),
    }
    law = Law(
        config.num_experts_per_tok,
        score_fn="sigmoid",
        normalize_weights=bool(config.norm_topk_prob),
        route_scale=float(config.routed_scaling_factor),
        num_groups=config.n_group,
        groups_per_token=config.topk_group,
        biased=True,
    )
    return arguments, law


def _write_dots1(anatomy: Anatomy) -> dict[str, Any]:
    a, law = anatomy.arguments, anatomy.law
    return {
        "n_routed_experts": max(a["num_experts"]),
        "n_shared_experts": a["num_shared_experts"],
        "num_experts_per_tok": law.top_k,
        "norm_topk_prob": law.normalize_weights,
        "routed_scaling_factor": law.route_scale,
        "n_group": law.num_groups,
        "topk_group": law.groups_per_token,
        "moe_intermediate_size": a["d_ff"],
        "intermediate_size": a["dense_d_ff"] or a["d_ff"],
        "first_k_dense_replace": _dense_first(a),
        "attention_bias": False,
        "sliding_window": None,
    }


def _write_glm4(anatomy: Anatomy) -> dict[str, Any]:
    written = _write_dots1(anatomy)
    del written["sliding_window"]
    return written | {
        "use_qk_norm": anatomy.arguments["qk_norm"],
        "partial_rotary_factor": 1.0,
        "num_mtp_layers": 0,
    }


def _read_ernie(config: Any) -> tuple[Arguments, Law]:
    routed = [
        (i + 1) % config.moe_layer_interval == 0
        and config.moe_layer_start_index <= i <= config.moe_layer_end_index
        for i in range(config.num_hidden_layers)
    ]
    arguments = {
        "d_ff": config.moe_intermediate_size,
        "dense_d_ff": config.intermediate_size,
        "num_experts": [config.moe_num_experts if is_moe else 0 for is_moe in routed],
        "num_shared_experts": config.moe_num_shared_experts or 0,
    }
    return arguments, Law(config.moe_k, biased=True)


def _write_ernie(anatomy: Anatomy) -> dict[str, Any]:
    a = anatomy.arguments
    return {
        "moe_num_experts": max(a["num_experts"]),
        "moe_num_shared_experts": a["num_shared_experts"],
        "moe_k": anatomy.law.top_k,
        "moe_intermediate_size": a["d_ff"],
        "intermediate_size": a["dense_d_ff"] or a["d_ff"],
        "moe_layer_start_index": _dense_first(a),
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "use_bias": False,
    }


def _dense_first(arguments: Arguments) -> int:
    return next(i for i, count in enumerate(arguments["num_experts"]) if count)


def _shared(width: int, d_ff: int) -> Arguments:
    if width % d_ff:
        raise ValueError(
            f"shared_expert_intermediate_size={width}: must be a multiple of moe_intermediate_size="
            f"{d_ff}, since our shared experts are as wide as the routed ones"
        )
    return {"num_shared_experts": width // d_ff}


_SOFTMAX = frozenset({"softmax scores"})
_QWEN = _SOFTMAX | {
    "weights that do not sum to 1", "dense first layers", "dense layers after MoE layers"
}  # fmt: skip
_DOTS1 = frozenset({
    "sigmoid scores", "weights that do not sum to 1", "route_scale", "a bias on the choice",
    "groups of experts", "query-key norm", "shared experts", "dense first layers",
})  # fmt: skip
_ERNIE = _SOFTMAX | {
    "a bias on the choice", "attention without query-key norm", "shared experts",
    "dense first layers",
}  # fmt: skip
_CORRECTION = "gate.e_score_correction_bias"

FAMILIES = {
    family.name: family
    for family in (
        Family("qwen3_moe", _QWEN | {"query-key norm"}, _read_qwen3, _write_qwen3),
        Family(
            "mixtral",
            _SOFTMAX | {"attention without query-key norm"},
            _read_mixtral,
            _write_mixtral,
            block="block_sparse_moe",
            experts=("w1", "w3", "w2"),
        ),
        Family(
            "qwen2_moe",
            _QWEN | {"attention without query-key norm", "shared experts"},
            _read_qwen2,
            _write_qwen2,
            shared="shared_expert",
            gated_shared=True,
        ),
        Family(
            "glm4_moe",
            _DOTS1 | {"attention without query-key norm"},
            _read_glm4,
            _write_glm4,
            shared="shared_experts",
            bias=_CORRECTION,
        ),
        Family(
            "dots1", _DOTS1, _read_glm4, _write_dots1, shared="shared_experts", bias=_CORRECTION
        ),
        Family(
            "ernie4_5_moe",
            _ERNIE,
            _read_ernie,
            _write_ernie,
            shared="shared_experts",
            empty_shared=False,
            bias="moe_statics.e_score_correction_bias",
            interleaved=True,
        ),
    )
}
