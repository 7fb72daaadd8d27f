"""Mixtures of experts of transformers, as they are or with routers of ours."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from routerlab.adapters.state import RoutingState
from routerlab.backbones.base_models import load_base, without_dropout
from routerlab.backbones.decoder import BackboneOutput
from routerlab.backbones.frozen import train_part
from routerlab.backbones.hugging_face_experts import NAME, HuggingFaceExperts, check_experts
from routerlab.backbones.hugging_face_routers import (
    NativeRouter,
    RoutedLayer,
    replace_routers,
    routed_blocks,
)
from routerlab.backbones.passes import (
    DTYPES,
    arguments_of,
    checkpoint_activations,
    pass_options,
    sizes_of,
)
from routerlab.core.checks import choice
from routerlab.core.protocols import Dispatch, Router
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.moe.layer import find_dispatch


class HuggingFaceMoE(nn.Module):
    """Next-token logits of a mixture of experts of transformers, and the records of its routers.

    Known are the families whose blocks hold ``experts`` beside one router that returns (logits,
    weights, experts) and follows one of `hugging_face_laws.LAWS`: OLMoE, Mixtral, Qwen2-MoE,
    Qwen3-MoE, DeepSeek-V3, GLM4-MoE, gpt-oss and their relatives. With its own routers the model's
    outputs are those of transformers, bit for bit, until a hook changes the logits of a router
    (`NativeRouter`). Its dropout is off.

    Args:
        path: a directory that ``save_pretrained`` wrote, or a name of the Hugging Face hub.
        cache_dir: where packaged models are downloaded and converted to.
        router: a callable ``(d_model=, num_experts=) -> Router`` whose routers take the place of
            the model's own, with the old gates' weights where shapes allow; None: its own.
        config: instead of ``path``, a config of transformers (or a dict with ``model_type``) whose
            model gets fresh weights and no tokenizer.
        dtype: of the weights, ``float32`` or ``bfloat16``. Routers that train are kept in float32,
            and so are routers of ours; other parts train in float32 only.
        trainable, trainable_layers: which part learns, see `train_part`.
        experts_implementation: how transformers computes the experts of its own routers
            (``eager``, ``grouped_mm``, ...); None: as it chooses.
        dispatch: how records of our routers reach the experts, see `MoE`; the model's own routers
            do not use it.
        activation_checkpointing: recompute each decoder layer in backward (non-reentrant).

    Attributes:
        model: the model of transformers; ``model.generate`` works, and leaves `records`.
        tokenizer: the model's, or None.
        moe_layers: its routed layers by the names of their records, in the order of depth.
        layer_names: their names.
        vocab_size: V, the width of the logits.
        max_positions: longest sequence.

    Raises ValueError for a dense model, for mixtures of another build, and for files that are not
    there or incomplete.
    """

    def __init__(
        self,
        path: str | None = None,
        cache_dir: str | Path = "~/.cache/routerlab",
        router: Callable[..., Router] | None = None,
        *,
        config: PretrainedConfig | dict[str, Any] | None = None,
        dtype: str = "float32",
        trainable: str = "all",
        trainable_layers: int | Sequence[int] | None = None,
        experts_implementation: str | None = None,
        dispatch: str | Dispatch = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        choice("dtype", dtype, tuple(DTYPES))
        if dtype == "bfloat16" and trainable not in ("routers", "none"):
            raise ValueError(
                f"trainable={trainable}: dtype=bfloat16 would lose small updates; must be routers "
                "(which are kept in float32) or none, or dtype=float32"
            )
        if (path is None) == (config is None):
            raise ValueError(f"path={path!r}: must be given, or a config instead of it")
        self.tokenizer: Any = None
        if path is not None:
            model, self.tokenizer = load_base(path, Path(cache_dir), DTYPES[dtype])
        else:
            model = AutoModelForCausalLM.from_config(_config(config), dtype=DTYPES[dtype])
        self.model: Any = model.eval()
        self.vocab_size, self.max_positions = sizes_of(model)
        self._takes = arguments_of(model)
        self._state = RoutingState()
        self.moe_layers: dict[str, RoutedLayer] = self._listen(
            router, experts_implementation, find_dispatch(dispatch)
        )
        self.layer_names = list(self.moe_layers)
        self._state.attach(model)
        model.config.output_router_logits = False  # its own losses would be added to its loss
        if activation_checkpointing:
            checkpoint_activations(model)
        self._train(trainable, trainable_layers)

    def _listen(
        self,
        router: Callable[..., Router] | None,
        implementation: str | None,
        dispatch: Dispatch,
    ) -> dict[str, RoutedLayer]:
        """The routed layers: their own routers heard, or others in their place."""
        blocks = routed_blocks(self.model)
        routers: dict[str, Any]
        if router is None:
            if implementation is not None:
                known = ("eager", *(name for name in ALL_EXPERTS_FUNCTIONS if name != NAME))
                choice("experts_implementation", implementation, known)
                self.model.set_experts_implementation(implementation)
            routers = {n: NativeRouter(b.router, self._state, n) for n, b in blocks.items()}
        else:
            if implementation is not None:
                raise ValueError(
                    f"experts_implementation={implementation!r}: goes with router=native; must be "
                    "null, since records of other routers go through our own"
                )
            for name, block in blocks.items():
                check_experts(block.module.experts, name)
                block.module.experts.dispatch = dispatch
            routers = replace_routers(blocks, router, self._state)
            self.model.set_experts_implementation(NAME)
        return {
            name: RoutedLayer(routers[name], HuggingFaceExperts(block.module.experts))
            for name, block in blocks.items()
        }

    def _train(self, trainable: str, layers: int | Sequence[int] | None) -> None:
        train_part(self, trainable, layers)
        for layer in self.moe_layers.values():
            if isinstance(layer.router, NativeRouter) and layer.router.gate.weight.requires_grad:
                layer.router.keep_float32()

    @property
    def records(self) -> dict[str, RouterOutput]:
        """What the routers decided in the last pass, also of ``model`` and in ``generate``."""
        return dict(self._state.records)

    def forward(
        self,
        input_ids: Int[Tensor, "B S"],
        context: RoutingContext | None = None,
        logits_to_keep: int = 0,
    ) -> BackboneOutput:
        """Logits [B keep V] of the last ``logits_to_keep`` positions (0: of all), in the dtype of
        the model, and the record of every routed layer. Padding (``context.valid``) may be on
        either side: real tokens do not attend to it, and positions count real tokens.
        """
        if context is None:
            batch_size, length = input_ids.shape
            context = RoutingContext(batch_size, length)
        options = pass_options(context, self.max_positions, logits_to_keep)
        options = {name: value for name, value in options.items() if name in self._takes}
        self._state.context = replace(context, token_ids=input_ids.reshape(-1))
        logits = self.model(input_ids=input_ids, **options).logits
        return BackboneOutput(logits[:, -logits_to_keep:], self.records)

    def count_parameters(self) -> dict[str, int]:
        """``total`` parameters, a tied head once; those ``active`` for one token: K of E experts a
        layer, or all of them where the router has no fixed ``top_k``; those ``trainable``; and the
        number of routed ``experts`` in all layers.
        """
        total, idle, experts = sum(p.numel() for p in self.parameters()), 0.0, 0
        for layer in self.moe_layers.values():
            num_experts = layer.experts.num_experts
            picked = getattr(layer.router, "top_k", num_experts)
            stacked = sum(p.numel() for p in layer.experts.parameters())
            idle += stacked * (1 - picked / num_experts)
            experts += num_experts
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        active = round(total - idle)
        return {"total": total, "active": active, "trainable": trainable, "experts": experts}

    def save_model(self, directory: str | Path) -> None:
        """Writes the model and its tokenizer as ``save_pretrained`` of transformers does: names and
        shapes are those of the model that it was. Raises ValueError if its routers were replaced.
        """
        if self.model.config._experts_implementation == NAME:
            raise ValueError(
                "save_model: its routers were replaced, and transformers has no class for such a "
                "model; use the checkpoint of the run"
            )
        self.model.save_pretrained(str(directory))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(directory))


def _config(config: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig:
    if isinstance(config, dict):
        if "model_type" not in config:
            raise ValueError(f"config={config}: must have model_type, such as olmoe")
        config = AutoConfig.for_model(**config)
    return without_dropout(copy.deepcopy(config))
