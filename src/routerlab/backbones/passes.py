"""How a batch is put before a model of transformers."""

import inspect
from typing import Any

import torch
from torch import nn

from routerlab.core.checks import within
from routerlab.core.routing import RoutingContext

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNBOUNDED = 2**31 - 1  # positions, of models that have no table of them


def sizes_of(model: Any) -> tuple[int, int]:
    """The width of a model's logits, and its longest sequence."""
    config = model.config.get_text_config()
    return config.vocab_size, getattr(config, "max_position_embeddings", None) or _UNBOUNDED


def arguments_of(model: nn.Module) -> frozenset[str]:
    """The names of what a model's forward pass takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def checkpoint_activations(model: Any) -> None:
    """Has each decoder layer recomputed in backward (non-reentrant)."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    # What transformers switches on here is for reentrant checkpointing. Without it no gradient goes
    # below the first layer that trains.
    model.disable_input_require_grads()


def pass_options(
    context: RoutingContext, max_positions: int, logits_to_keep: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a pass without a cache. Padding (``context.valid``) may be on either
    side: real tokens do not attend to it, and positions count real tokens.
    """
    batch_size, length = context.batch_size, context.sequence_length
    if length > max_positions:
        raise ValueError(f"sequence of {length} tokens: longer than max_positions={max_positions}")
    within("logits_to_keep", logits_to_keep, 0, length)
    options: dict[str, Any] = {"use_cache": False}
    if context.valid is not None:
        mask = context.valid.view(batch_size, length).long()
        options["attention_mask"] = mask
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if logits_to_keep:
        options["logits_to_keep"] = logits_to_keep
    return options
