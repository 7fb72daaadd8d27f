"""Decoders in a directory: ``backbone.yaml``, ``model.safetensors`` and the tokenizer's files."""

import importlib
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from routerlab.backbones.decoder import Decoder
from routerlab.backbones.frozen import train_part
from routerlab.core.instantiate import LIBRARIES
from routerlab.core.protocols import Dispatch, Router
from routerlab.experts.swiglu import SwiGLU
from routerlab.routers.build import with_balancer

FORMAT = 1
SETTINGS, WEIGHTS = "backbone.yaml", "model.safetensors"
_ROOMS = ("routerlab.routers.", "routerlab.balancers.")


def save_decoder(
    directory: Path | str,
    decoder: Decoder,
    router: Mapping[str, Any],
    balancer: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """Writes ``decoder`` to ``directory``, all of it or nothing.

    Args:
        directory: a new or empty directory.
        decoder: with `SwiGLU` experts, as many in every layer that has any.
        router, balancer: the config nodes (``_target_`` and arguments) that its routers are made
            from.
        tokenizer: of transformers, or None.

    Raises ValueError if the directory holds something, or the decoder is another one.
    """
    with staged(directory) as folder:
        write_decoder(folder, decoder, router, balancer, tokenizer)


def write_decoder(
    folder: Path,
    decoder: Decoder,
    router: Mapping[str, Any],
    balancer: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """The files of `save_decoder`, in an existing folder."""
    arguments = arguments_of(decoder)
    nodes = {"router": dict(router), "balancer": None if balancer is None else dict(balancer)}
    settings = OmegaConf.create({"format": FORMAT, "decoder": arguments} | nodes)
    (folder / SETTINGS).write_text(OmegaConf.to_yaml(settings, resolve=True))
    tensors = {key: value.contiguous() for key, value in weights_of(decoder).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_decoder(
    path: Path | str,
    router: Callable[..., Router] | None = None,
    trainable: str = "all",
    trainable_layers: int | Sequence[int] | None = None,
    dispatch: str | Dispatch = "auto",
    activation_checkpointing: bool = False,
    keep_trunk: bool = False,
) -> Decoder:
    """The decoder that `save_decoder` wrote, with its tokenizer (or None) as ``.tokenizer``.

    Args:
        path: the directory.
        router: a callable ``(d_model=, num_experts=) -> Router`` that takes the place of the saved
            routers. Their tensors are kept where a new one of the same name has the same shape (the
            gate's weights, mostly); a warning tells which were not. None: the saved routers.
        trainable, trainable_layers: see `train_part`.
        dispatch, activation_checkpointing: see `Decoder`.
        keep_trunk: see `Decoder.keep_trunk`.

    Raises ValueError for a directory that holds no decoder, or only a part of one.
    """
    folder = Path(path).expanduser()
    settings = _read_settings(folder)
    arguments: Any = OmegaConf.to_container(settings.decoder, resolve=True)
    runtime = {"dispatch": dispatch, "activation_checkpointing": activation_checkpointing}
    make = with_balancer(settings) if router is None else router
    try:
        decoder = Decoder(make, **arguments, **runtime)
    except TypeError as error:
        raise ValueError(f"{folder / SETTINGS}: decoder: {error}") from error
    tensors = _read_weights(folder)
    if router is not None:
        tensors = _with_other_routers(tensors, weights_of(decoder))
    _put_weights(decoder, tensors, str(folder / WEIGHTS))
    decoder.tokenizer = read_tokenizer(folder)  # type: ignore[assignment]
    train_part(decoder, trainable, trainable_layers)
    if keep_trunk:
        decoder.keep_trunk()
    return decoder


@contextmanager
def staged(directory: Path | str) -> Iterator[Path]:
    """A scratch folder that becomes ``directory`` when the block ends; nothing is left of it if the
    block raises. ValueError for a directory that holds something, which is never overwritten.
    """
    target = Path(directory).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{str(directory)!r}: exists already and is not an empty directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        yield scratch
        scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def weights_of(decoder: Decoder) -> dict[str, Tensor]:
    """Every tensor of a decoder's state, frozen ones too; a tied head goes by the embedding's
    name alone.
    """
    children: Any = decoder.named_children()  # the decoder itself may hide what is frozen
    found = {f"{n}.{key}": t for n, child in children for key, t in child.state_dict().items()}
    if decoder.embed_tokens.weight is decoder.lm_head.weight:
        del found["lm_head.weight"]
    return found


def arguments_of(decoder: Decoder) -> dict[str, Any]:
    """The arguments that make a decoder of the same shape, router and experts aside."""
    blocks: Any = list(decoder.layers)
    counts = [0 if block.moe is None else block.moe.experts.num_experts for block in blocks]
    layer = next(block.moe for block in blocks if block.moe is not None)
    if not isinstance(layer.experts, SwiGLU):
        raise ValueError(f"experts {type(layer.experts).__name__}: must be SwiGLU")
    attention, head_dim = blocks[0].self_attn, blocks[0].self_attn.head_dim
    d_ff = layer.experts.down_proj.shape[2]
    dense = [block.mlp.down_proj.in_features for block in blocks if block.mlp is not None]
    shared = layer.shared_experts
    return {
        "vocab_size": decoder.vocab_size,
        "d_model": decoder.lm_head.in_features,
        "num_layers": len(blocks),
        "num_heads": attention.q_proj.out_features // head_dim,
        "num_kv_heads": attention.k_proj.out_features // head_dim,
        "head_dim": head_dim,
        "d_ff": d_ff,
        "dense_d_ff": dense[0] if dense else None,
        "num_experts": counts,
        "num_shared_experts": 0 if shared is None else shared.down_proj.in_features // d_ff,
        "max_positions": decoder.max_positions,
        "qk_norm": not isinstance(attention.q_norm, nn.Identity),
        "tie_embeddings": decoder.embed_tokens.weight is decoder.lm_head.weight,
        "rope_theta": decoder.rope_theta,
        "rms_norm_eps": decoder.norm.eps,
    }


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer whose files lie in a folder, None where there are none."""
    if not any((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r}: its tokenizer cannot be read ({error})") from error


def _read_settings(folder: Path) -> DictConfig:
    if not (folder / SETTINGS).is_file():
        hint = "it has no backbone.yaml"
        if (folder / "config.json").is_file():
            hint = "it is one of transformers: use `routerlab import`, or backbone=hugging_face"
        elif not folder.is_dir():
            hint = "no such directory"
        raise ValueError(f"path={str(folder)!r}: holds no saved decoder ({hint})")
    try:
        settings = OmegaConf.load(folder / SETTINGS)
    except Exception as error:  # yaml and omegaconf have many
        raise ValueError(f"{folder / SETTINGS}: cannot be read ({error})") from error
    found = dict(settings) if isinstance(settings, DictConfig) else {}
    if found.get("format") != FORMAT or not found.keys() >= {"decoder", "router", "balancer"}:
        raise ValueError(
            f"{folder / SETTINGS}: format={found.get('format')}, with {sorted(map(str, found))}: "
            f"must be format {FORMAT} with balancer, decoder, router"
        )
    _check_ours(settings, folder / SETTINGS)
    return cast(DictConfig, settings)


def _check_ours(node: Any, place: Path) -> None:
    """A directory may come from anywhere: it names routers and balancers of ours, or of the user's
    own config directories, and nothing else that could be called.
    """
    if isinstance(node, DictConfig | ListConfig):
        for value in node.values() if isinstance(node, DictConfig) else node:
            _check_ours(value, place)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return
    module, _, name = str(node["_target_"]).rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name) if module.startswith(_ROOMS) else None
    except (ImportError, AttributeError):
        made = None
    # Names of other packages than these are checked against the user's directories once they are
    # called, as in every config.
    if module.split(".")[0] in LIBRARIES and getattr(made, "__module__", None) != module:
        raise ValueError(
            f"{place}: _target_={node['_target_']!r}: must be a router or a balancer of routerlab, "
            "or from a directory given with --config-dir"
        )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"path={str(folder)!r}: has no {WEIGHTS}: it was written only in part")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: cannot be read, perhaps written only in part: {error}") from None


@torch.no_grad()
def _put_weights(decoder: Decoder, tensors: Mapping[str, Tensor], source: str) -> None:
    own = weights_of(decoder)
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += sorted(k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape)
    if wrong:
        raise ValueError(
            f"{source}: does not fit the model: {len(wrong)} tensors are missing, too many or of "
            f"another shape, such as {wrong[0]}"
        )
    for key, value in own.items():
        value.copy_(tensors[key])


def _with_other_routers(
    saved: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``saved``, with the new routers' own tensors where no saved one fits."""

    def is_router(key: str) -> bool:
        return ".moe.router." in key

    fits = {k for k in saved.keys() & own.keys() if saved[k].shape == own[k].shape}
    for what, keys in (("dropped", saved.keys() - fits), ("fresh", own.keys() - fits)):
        if found := sorted(filter(is_router, keys)):
            text = f"{len(found)} tensors of the routers are {what}, such as {found[0]}"
            warnings.warn(text, stacklevel=3)
    kept = {key: value for key, value in saved.items() if key in fits or not is_router(key)}
    return kept | {key: own[key] for key in own.keys() - fits if is_router(key)}
