"""From a wrapped model of transformers, trained here, back to a directory of transformers."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from routerlab.backbones.base_models import undisturbed
from routerlab.backbones.hugging_face import HuggingFaceMoE
from routerlab.backbones.saved import staged
from routerlab.convert.certificate import Certificate, Move
from routerlab.convert.checkpoint import load_and_note
from routerlab.convert.compare import Seen, compare, random_tokens


def export_wrapped(
    backbone: HuggingFaceMoE, out: Path | str, seed: int = 0, source: str = "model"
) -> Certificate:
    """Writes a wrapped model with its own routers as ``save_pretrained`` does, reads the directory
    again, and compares: every tensor must be there and equal, and both models must say the same of
    random tokens (of ``seed``) in float32, which ``backbone`` is in afterwards.

    Raises `ConversionFailed`; ValueError for replaced routers or an ``out`` that holds something.
    """
    family = str(backbone.model.config.model_type)
    certificate = Certificate("export", source, str(out), family)
    with staged(out) as folder, undisturbed():
        backbone.save_model(folder)
        again = load_and_note(folder, certificate)
        own, read = (_tensors(model.cpu().float()) for model in (backbone.model, again))
        certificate.source_keys, certificate.target_keys = list(own), list(read)
        for name in sorted(own.keys() & read.keys()):
            certificate.moves.append(Move((name,), (name,), "read back"))
            if not torch.equal(own[name], read[name]):
                certificate.faults.append(f"{name}: was written with other values")
        certificate.check()
        tokens = random_tokens(backbone.vocab_size, backbone.max_positions, seed)
        certificate.comparison = compare(_see(backbone.model, tokens), _see(again, tokens))
        certificate.check()
        certificate.write(folder)
    return certificate


def _tensors(model: Any) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _see(model: Any, tokens: Int[Tensor, "B S"]) -> Seen:
    return Seen([], {}, model.eval()(tokens, use_cache=False).logits.float())
