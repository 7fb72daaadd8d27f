"""From a decoder of ours to a checkpoint of transformers."""

from pathlib import Path
from typing import Any

import torch

from routerlab.backbones.base_models import undisturbed
from routerlab.backbones.decoder import Decoder
from routerlab.backbones.saved import arguments_of, staged, weights_of
from routerlab.convert.certificate import Certificate, Move
from routerlab.convert.checkpoint import Checkpoint, load_and_note, write_checkpoint
from routerlab.convert.compare import compare, random_tokens, see_decoder, see_transformers
from routerlab.convert.configs import write_config
from routerlab.convert.families import Anatomy, Family, fitting_family
from routerlab.convert.law import law_of
from routerlab.convert.names import all_links


def export_model(
    decoder: Decoder,
    out: Path | str,
    family: str = "auto",
    tokenizer: Any = None,
    seed: int = 0,
    source: str = "decoder",
) -> Certificate:
    """Writes a decoder as a directory that ``AutoModelForCausalLM.from_pretrained`` loads, with the
    tokenizer and the certificate.

    Args:
        decoder: with `TokenChoice` routers that drop nothing in evaluation.
        out: a new or empty directory.
        family: the ``model_type`` to write, or ``auto``: the first that holds everything.
        tokenizer: of transformers, or None.
        seed: of the random tokens that both models are compared on.
        source: what the certificate calls the decoder.

    Raises `ConversionFailed`, ValueError for a decoder that no class of transformers can be, naming
    why, or an ``out`` that holds something.
    """
    law, in_training = law_of(decoder)
    anatomy = Anatomy(arguments_of(decoder), law)
    chosen = fitting_family(anatomy, family)
    certificate = Certificate("export", source, str(out), chosen.name)
    if in_training:
        told = ", ".join(in_training)
        certificate.notes.append(f"{told}: of training alone, has no place in {chosen.name}")
    with staged(out) as folder, undisturbed():
        write_hugging_face(folder, decoder, anatomy, chosen, certificate, tokenizer)
        verify_export(folder, decoder, certificate, seed)
        certificate.write(folder)
    return certificate


def write_hugging_face(
    folder: Path,
    decoder: Decoder,
    anatomy: Anatomy,
    family: Family,
    certificate: Certificate,
    tokenizer: Any = None,
) -> None:
    """The files of a decoder as one of ``family``, in an existing folder; the certificate gets to
    know where each tensor went.
    """
    own, tensors = weights_of(decoder), {}
    for link in all_links(family, anatomy):
        value = torch.empty(0) if link.ours is None else own[link.ours].float()
        tensors |= dict(zip(link.theirs, link.to_theirs(value), strict=True))
        sources = () if link.ours is None else (link.ours,)
        certificate.moves.append(Move(sources, link.theirs, link.how))
    certificate.source_keys = list(own)
    write_checkpoint(folder, write_config(family, anatomy, tokenizer), tensors)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def verify_export(folder: Path, decoder: Decoder, certificate: Certificate, seed: int = 0) -> None:
    """Reads the folder as transformers does, and compares; raises `ConversionFailed`."""
    certificate.target_keys = Checkpoint(folder, certificate.target).keys
    certificate.check()
    model = load_and_note(folder, certificate)
    certificate.check()
    tokens = random_tokens(decoder.vocab_size, decoder.max_positions, seed)
    ours, theirs = see_decoder(decoder.float(), tokens), see_transformers(model, tokens)
    certificate.comparison = compare(ours, theirs)
    certificate.check()
