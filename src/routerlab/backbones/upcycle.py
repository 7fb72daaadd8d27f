"""Mixtures of experts made of dense pretrained language models."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from routerlab.backbones.base_models import load_base
from routerlab.backbones.decoder import Decoder
from routerlab.backbones.frozen import train_part
from routerlab.core.checks import within
from routerlab.core.layers import pick_layers
from routerlab.core.protocols import Dispatch, Router

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose blocks are a Decoder's, but for options


@dataclass(frozen=True, slots=True)
class Written:
    """Where the parameter ``target`` of an upcycled model comes from: the ``sources`` of the dense
    model (none: it is fresh), and ``how`` they became it.
    """

    target: str
    sources: tuple[str, ...]
    how: str


def upcycled(
    path: str,
    cache_dir: str | Path,
    router: Callable[..., Router],
    *,
    num_experts: int,
    layers: int | Sequence[int] | None = None,
    slices: int = 1,
    noise_std: int | float = 0.0,
    seed: int = 0,
    trainable: str = "all",
    trainable_layers: int | Sequence[int] | None = None,
    dispatch: str | Dispatch = "auto",
    activation_checkpointing: bool = False,
    keep_trunk: bool = False,
) -> Decoder:
    """A `Decoder` with the weights and the tokenizer of the dense model that ``path`` names
    (`load_base`), and mixtures of experts in ``layers`` (`upcycle`), in evaluation mode. ``layers``
    takes a number (the last n), a list of layer numbers from 0, or None (all); ``trainable`` and
    ``trainable_layers`` say what learns (`train_part`), ``keep_trunk`` whether what the frozen
    layers below make of a sequence is kept (`Decoder.keep_trunk`). Weights are float32.
    """
    model, tokenizer = load_base(path, Path(cache_dir), torch.float32)
    decoder, _ = upcycle(
        model,
        router,
        num_experts=num_experts,
        layers=layers,
        slices=slices,
        noise_std=noise_std,
        seed=seed,
        dispatch=dispatch,
        activation_checkpointing=activation_checkpointing,
    )
    decoder.tokenizer = tokenizer
    train_part(decoder, trainable, trainable_layers)
    if keep_trunk:
        decoder.keep_trunk()
    return decoder.eval()


@torch.no_grad()
def upcycle(
    model: Any,
    router: Callable[..., Router],
    *,
    num_experts: int,
    layers: int | Sequence[int] | None = None,
    slices: int = 1,
    noise_std: int | float = 0.0,
    seed: int = 0,
    dispatch: str | Dispatch = "auto",
    activation_checkpointing: bool = False,
) -> tuple[Decoder, list[Written]]:
    """A `Decoder` that has the weights of a dense model of transformers, and where each of its
    parameters comes from.

    Experts are copies of the layer's feed-forward network (Komatsuzaki et al., arXiv 2212.05055).
    With ``slices`` G > 1 they are fine-grained (He et al., arXiv 2410.07524): expert cG + s is
    slice s of copy c, 1/G of the network's width, its down projection times G. The gate's rows for
    the G slices of a copy start equal (a virtual group), so that whole copies are picked.

    The logits are those of the dense model, up to rounding, if the weights of a token's experts sum
    to 1 (``normalize_weights``), no expert turns tokens away and there is no noise. With slices the
    gate must also tell copies apart (``init_std`` above 0): of equal scores parts may be picked.

    Args:
        model: of one of the `FAMILIES`, without biases, rope scaling or a sliding window.
        router: a callable ``(d_model=, num_experts=) -> Router``.
        num_experts: E of each new layer, a multiple of G.
        layers: which layers become mixtures: the last n, a list of numbers, or None for all.
        slices: G, pieces of a copy; must divide its width and the router's ``top_k``.
        noise_std: of Gaussian noise on the experts' weights, over the standard deviation of each
            weight matrix; it tells copies apart from the start, and changes the logits.
        seed: of the noise.
        dispatch, activation_checkpointing: as in `Decoder`.
    """
    sizes = _sizes(model)
    within("num_experts", num_experts, 1)
    within("noise_std", noise_std, 0)
    within("slices", slices, 1)
    width = sizes["dense_d_ff"]
    for field, size in (("num_experts", num_experts), ("intermediate_size", width)):
        if size % slices:
            raise ValueError(f"slices={slices}: must divide {field}={size}")
    names = [f"layers.{i}" for i in range(sizes["num_layers"])]
    mixed = pick_layers(names, layers, "layers")
    decoder = Decoder(
        router,
        num_experts=[num_experts if name in mixed else 0 for name in names],
        d_ff=width // slices,
        dispatch=dispatch,
        activation_checkpointing=activation_checkpointing,
        **sizes,
    )
    written = _copy(model, decoder, num_experts, slices, noise_std, seed)
    for layer in decoder.moe_layers.values():
        _make_groups(layer.router, slices)
    how = "fresh" if slices == 1 else "fresh, equal for the slices of a copy"
    fresh = [name for name, _ in decoder.named_parameters() if ".router." in name]
    return decoder, written + [Written(name, (), how) for name in fresh]


def _copy(
    model: Any,
    decoder: Decoder,
    num_experts: int,
    slices: int,
    noise_std: int | float,
    seed: int,
) -> list[Written]:
    """Writes all but the routers; ValueError for a tensor of the dense model that is left over."""
    source, target = dict(model.named_parameters()), dict(decoder.named_parameters())
    draws, written = torch.Generator().manual_seed(seed), []
    for entry, value in _moves(source, target, num_experts, slices):
        target[entry.target].copy_(value)
        if noise_std and ".experts." in entry.target:
            noise = torch.randn(value.shape, generator=draws)
            target[entry.target].add_(noise, alpha=noise_std * float(value.std()))
        written.append(entry)
    used = {key for entry in written for key in entry.sources}
    if left := sorted(source.keys() - used):
        raise ValueError(
            f"{_where(model)}: a Decoder has no place for {len(left)} of its tensors, such as "
            f"{left[0]}"
        )
    return written


def _moves(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], num_experts: int, slices: int
) -> Iterator[tuple[Written, Tensor]]:
    """Each parameter that comes from the dense model, with its new value."""
    for key, tensor in source.items():
        if (name := key.removeprefix("model.")) in target:
            yield Written(name, (key,), "renamed"), tensor
    copies = num_experts // slices
    cut = f", cut in {slices} slices" if slices > 1 else ""
    for name in target:
        block = name.partition("mlp.")[0].partition("moe.")[0]
        gate, up, down = (f"model.{block}mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        if name.endswith("mlp.gate_up_proj.weight"):
            yield Written(name, (gate, up), "stacked"), torch.cat([source[gate], source[up]])
        elif name.endswith("experts.gate_up_proj"):
            pieces = [source[key].unflatten(0, (slices, -1)) for key in (gate, up)]
            experts = torch.cat(pieces, dim=1).repeat(copies, 1, 1)
            yield Written(name, (gate, up), f"stacked{cut}, {copies} copies"), experts
        elif name.endswith("experts.down_proj"):
            pieces = source[down].unflatten(1, (slices, -1)).transpose(0, 1)
            experts = pieces.repeat(copies, 1, 1) * slices
            times = f", times {slices}" if slices > 1 else ""
            yield Written(name, (down,), f"{copies} copies{cut}{times}"), experts


def _make_groups(router: Any, slices: int) -> None:
    """Gives the gate equal rows for the slices of a copy."""
    if slices == 1:
        return
    name, top_k = type(router).__name__, getattr(router, "top_k", None)
    weight = getattr(getattr(router, "gate", None), "weight", None)
    if weight is None or top_k is None:
        raise ValueError(
            f"slices={slices}: router {name} picks no fixed number of experts by the rows of a "
            "gate; use router=token_choice, or slices=1"
        )
    if top_k % slices:
        raise ValueError(f"slices={slices}: must divide router.top_k={top_k}, to pick whole copies")
    weight.copy_(weight[::slices].repeat_interleave(slices, dim=0))


def _sizes(model: Any) -> dict[str, Any]:
    """Arguments of a `Decoder` with the layers of a dense model; ValueError for what it lacks."""
    config, where = model.config, _where(model)
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    if any(getattr(config, name, None) for name in counts):
        raise ValueError(
            f"{where}: is a mixture of experts already; bring it over with `routerlab import`"
        )
    if config.model_type not in FAMILIES:
        raise ValueError(f"{where}: can upcycle {', '.join(FAMILIES)}, not {config.model_type}")
    rope, window = config.rope_parameters, getattr(config, "sliding_window", None)
    lacks = {
        f"hidden_act={config.hidden_act!r}": config.hidden_act not in ("silu", "swish"),
        f"rope_type={rope['rope_type']!r}": rope["rope_type"] != "default",
        "partial rotary positions": rope.get("partial_rotary_factor") not in (None, 1.0),
        f"sliding_window={window}": window and window < config.max_position_embeddings,
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
    }
    if found := [feature for feature, there in lacks.items() if there]:
        raise ValueError(f"{where}: has {', '.join(found)}, which a Decoder does not have")
    heads = config.num_attention_heads
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads,
        "dense_d_ff": config.intermediate_size,
        "max_positions": config.max_position_embeddings,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "qk_norm": config.model_type == "qwen3",
        "tie_embeddings": config.tie_word_embeddings,
        "rope_theta": float(rope["rope_theta"]),
        "rms_norm_eps": config.rms_norm_eps,
    }


def _where(model: Any) -> str:
    return f"path={model.name_or_path!r} ({type(model).__name__})"
