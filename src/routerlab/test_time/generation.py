"""Greedy generation that is rerouted, and adapted again as the text grows."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from routerlab.core.checks import within
from routerlab.core.routing import RoutingContext
from routerlab.test_time.plug_in import TestTime, edited

# The likeliest token and nothing else, whatever a model's own generation config says.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def generate(
    backbone: Any,
    input_ids: Int[Tensor, "B S"],
    valid: Bool[Tensor, "B S"] | None,
    max_new_tokens: int,
    plug_in: TestTime | None = None,
) -> Int[Tensor, "B _"]:
    """``input_ids`` [B, S] and ``max_new_tokens`` more, each the likeliest; nothing ends early.

    ``valid`` is False on padding, which must be on the left; None: there is none. A plug-in looks
    at all text so far before the first token and after each ``plug_in.every`` of them; what was
    cached before is then read anew. Models of transformers run their own ``generate`` with a cache.

    Raises ValueError for padding on the right.
    """
    within("max_new_tokens", max_new_tokens, 0)
    valid = torch.ones_like(input_ids, dtype=torch.bool) if valid is None else valid
    if not bool(valid[:, -1].all()):
        raise ValueError("valid: padding must be on the left, where a text does not go on")
    ids, edit = input_ids, None
    every = max_new_tokens if plug_in is None else plug_in.every or max_new_tokens
    for done in range(0, max_new_tokens, max(every, 1)):
        valid = torch.cat([valid, valid.new_ones(len(ids), ids.shape[1] - valid.shape[1])], dim=1)
        if plug_in is not None:
            edit = plug_in.adapt(backbone, {"input_ids": ids}, _context(valid, 0), edit)
        with torch.no_grad(), edited(backbone, edit):
            ids = _continued(backbone, ids, valid, min(every, max_new_tokens - done))
    return ids


def _continued(backbone: Any, ids: Tensor, valid: Tensor, count: int) -> Tensor:
    """``ids`` and ``count`` tokens more."""
    if hasattr(backbone, "model"):
        options: dict[str, Any] = {"attention_mask": valid.long(), "max_new_tokens": count}
        return backbone.model.generate(input_ids=ids, **options, **_GREEDY)
    for added in range(count):
        logits = backbone(ids, _context(valid, added), logits_to_keep=1).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def _context(valid: Tensor, added: int) -> RoutingContext:
    """The context of a text [B, S] and ``added`` tokens that were said since."""
    batch_size = len(valid)
    more = valid.new_ones(batch_size, added)
    real = torch.cat([valid, more], dim=1)
    return RoutingContext(
        batch_size=batch_size,
        sequence_length=real.shape[1],
        valid=None if bool(real.all()) else real.flatten(),
        prompt=torch.cat([valid, ~more], dim=1).flatten(),
    )
