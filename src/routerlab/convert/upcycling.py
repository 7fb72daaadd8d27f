"""From a dense checkpoint of transformers to a mixture of experts of ours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from routerlab.backbones.base_models import find_base, undisturbed, weight_files
from routerlab.backbones.saved import load_decoder, read_tokenizer, staged, write_decoder
from routerlab.backbones.upcycle import upcycle
from routerlab.convert.certificate import Certificate, Move
from routerlab.convert.checkpoint import load_and_note, local_folder
from routerlab.convert.compare import compare, random_tokens, see_decoder, see_transformers
from routerlab.core.config import ConfigError, compose
from routerlab.routers.build import with_balancer

_KNOBS = ("num_experts", "layers", "slices", "noise_std", "seed")  # of `upcycle`


def upcycle_model(
    path: str, out: Path | str, words: Sequence[str] = (), seed: int = 0
) -> Certificate:
    """Writes the dense model that ``path`` names as a mixture of experts (`upcycle`) to the new
    directory ``out`` (`save_decoder`, in float32), with its tokenizer and the certificate.

    Args:
        path: a packaged model, a directory, or a name of the Hugging Face hub.
        out: a new or empty directory.
        words: as for a run with ``backbone=upcycled``: ``backbone.num_experts=8``, ``router=NAME``,
            ``router.KNOB=VALUE``, ``balancer=NAME``.
        seed: of the random tokens that both models are compared on, and of fresh weights.

    Raises `ConversionFailed` (also where the router's weights do not sum to 1, or with noise, since
    the logits are others then), ConfigError for a wrong word, ValueError for a model that cannot be
    upcycled or an ``out`` that holds something.
    """
    from transformers import AutoConfig

    for word in words:
        if word.split("=")[0].lstrip("+~").split(".")[0] not in ("backbone", "router", "balancer"):
            raise ConfigError(f"{word!r}: must be of backbone, router or balancer")
    cfg = compose("backbone=upcycled", f"seed={seed}", *words, f"backbone.path='{path}'")
    nodes: Any = OmegaConf.to_container(cfg, resolve=True)
    with staged(out) as folder, undisturbed():
        source = local_folder(find_base(path, Path(cfg.backbone.cache_dir)))
        weight_files(path, source)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        certificate = Certificate("upcycle", path, str(out), config.model_type)
        model = load_and_note(source, certificate)
        model.name_or_path = path  # what messages call it
        certificate.check()
        torch.manual_seed(seed)
        knobs = {name: nodes["backbone"][name] for name in _KNOBS}
        decoder, written = upcycle(model, with_balancer(cfg), **knobs)
        certificate.moves = [Move(one.sources, (one.target,), one.how) for one in written]
        certificate.source_keys = [name for name, _ in model.named_parameters()]
        certificate.target_keys = [name for name, _ in decoder.named_parameters()]
        certificate.check()
        write_decoder(folder, decoder, nodes["router"], nodes["balancer"], read_tokenizer(source))
        tokens = random_tokens(decoder.vocab_size, decoder.max_positions, seed)
        ours = see_decoder(load_decoder(folder), tokens)
        certificate.comparison = compare(see_transformers(model, tokens), ours)
        certificate.check()
        certificate.write(folder)
    return certificate
