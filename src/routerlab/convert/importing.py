"""From a checkpoint of transformers to a decoder of ours."""

from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from routerlab.backbones.base_models import find_base, undisturbed
from routerlab.backbones.decoder import Decoder
from routerlab.backbones.saved import (
    load_decoder,
    read_tokenizer,
    staged,
    weights_of,
    write_decoder,
)
from routerlab.convert.certificate import Certificate, Move
from routerlab.convert.checkpoint import Checkpoint, load_with_transformers, local_folder
from routerlab.convert.compare import compare, random_tokens, see_decoder, see_transformers
from routerlab.convert.configs import read_config
from routerlab.convert.families import Anatomy, Family
from routerlab.convert.names import all_links
from routerlab.routers.build import with_balancer


def import_model(path: str, out: Path | str, cache_dir: Path, seed: int = 0) -> Certificate:
    """Writes the mixture of experts that ``path`` names as a decoder of ours (`save_decoder`, in
    float32) to the new directory ``out``, with its tokenizer and the certificate.

    Tensors are read from the files by our own names; the reference of the comparison is the model
    that transformers makes of them. Dropout of the model is not brought along.

    Args:
        path: a directory, or a name of the Hugging Face hub.
        out: a new or empty directory.
        cache_dir: of packaged models.
        seed: of the random tokens that both models are compared on.

    Raises `ConversionFailed`, ValueError for a model that our decoder cannot be (naming why), a
    broken checkpoint or an ``out`` that holds something.
    """
    from transformers import AutoConfig

    with staged(out) as folder, undisturbed():
        source = local_folder(find_base(path, cache_dir))
        family, anatomy = read_config(AutoConfig.from_pretrained(source, trust_remote_code=False))
        checkpoint = Checkpoint(source, path)
        anatomy = _with_real_shared_experts(family, anatomy, checkpoint)
        certificate = Certificate("import", path, str(out), family.name)
        decoder = _read_decoder(checkpoint, family, anatomy, certificate)
        write_decoder(folder, decoder, *anatomy.law.nodes(), read_tokenizer(source))
        tokens = random_tokens(decoder.vocab_size, decoder.max_positions, seed)
        ours = see_decoder(load_decoder(folder), tokens)
        theirs = see_transformers(load_with_transformers(source)[0], tokens)
        certificate.comparison = compare(theirs, ours)
        certificate.check()
        certificate.write(folder)
    return certificate


@torch.no_grad()
def _read_decoder(
    checkpoint: Checkpoint, family: Family, anatomy: Anatomy, certificate: Certificate
) -> Decoder:
    links = all_links(family, anatomy, set(checkpoint.keys))
    router, balancer = anatomy.law.nodes()
    make = with_balancer(OmegaConf.create({"router": router, "balancer": balancer}))
    decoder = Decoder(make, **anatomy.arguments)
    own = weights_of(decoder)
    certificate.source_keys, certificate.target_keys = checkpoint.keys, list(own)
    certificate.moves = [
        Move(link.theirs, () if link.ours is None else (link.ours,), link.how) for link in links
    ]
    certificate.check()
    for link in links:
        try:
            value = link.to_ours([checkpoint.read(key) for key in link.theirs])
            if link.ours is not None and value.shape != own[link.ours].shape:
                wanted = list(own[link.ours].shape)
                raise ValueError(f"makes {list(value.shape)}, must be {wanted}")
        except (ValueError, RuntimeError) as error:  # of torch: shapes that do not stack
            certificate.faults.append(f"{link.theirs[0]}: {error}")
            continue
        if link.ours is not None:
            own[link.ours].copy_(value)
    certificate.check()
    return decoder


def _with_real_shared_experts(family: Family, anatomy: Anatomy, checkpoint: Checkpoint) -> Anatomy:
    """Shared experts that are zeros are none; a learned gate on them is refused."""
    if not family.gated_shared or not anatomy.arguments["num_shared_experts"]:
        return anatomy
    block = f".{family.block}.{family.shared}"
    keys = [key for key in checkpoint.keys if key.endswith(f"{block}.down_proj.weight")]
    if not any(checkpoint.read(key).any() for key in keys):
        arguments = anatomy.arguments | {"num_shared_experts": 0}
        return replace(anatomy, arguments=arguments)
    gates = [key for key in checkpoint.keys if key.endswith(f"{block}_gate.weight")]
    if any(checkpoint.read(key).any() for key in gates):
        raise ValueError(
            f"{family.name} with a learned gate on its shared experts ({block[1:]}_gate): ours "
            "have none; wrap the model as it is with backbone=hugging_face"
        )
    return anatomy
