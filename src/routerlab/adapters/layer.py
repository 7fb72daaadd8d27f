"""An adapted linear: the frozen module plus a routed mixture of LoRA experts."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from routerlab.adapters.config import MixtureOfLoraConfig
from routerlab.adapters.experts import (
    CoreExperts,
    LoraExperts,
    SharedAExperts,
    add_product,
    mixing_weights,
)
from routerlab.adapters.state import RoutingState, with_prompt_embedding
from routerlab.core.routing import RouterOutput, RoutingContext

CANNOT_MERGE = (
    "a mixture of LoRA experts cannot be merged into the base weights: which experts a token gets "
    "depends on the token. Keep the adapter, or train a plain LoRA where you need one matrix"
)


class MixtureLayer(BaseTunerLayer):
    """What all adapted layers share. Experts and routers are kept by adapter name.

    ``name`` is that of the layer's records (``layers.03.mlp.gate_proj``); ``block`` that of its
    parent module, whose record it takes where routers have scope ``block``.
    """

    adapter_layer_names = ("mix_experts", "mix_router")
    other_param_names = ("configs",)
    forms: tuple[str, ...] = ()  # of experts that such a layer can have
    training: bool

    def __init__(self, base_layer: nn.Module, name: str, block: str, state: RoutingState) -> None:
        self.base_layer = base_layer
        self.mix_experts = nn.ModuleDict()
        self.mix_router = nn.ModuleDict()
        self.configs: dict[str, MixtureOfLoraConfig] = {}
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names = {}
        self.name, self.block, self.state = name, block, state
        self.number = len(state.layers)
        state.layers[name] = self
        self._disable_adapters = False
        self._active_adapter = []

    @property
    def router(self) -> nn.Module | None:
        """The router of the active adapter."""
        return self._of_active(self.mix_router)

    @property
    def experts(self) -> Any:
        """The experts of the active adapter."""
        return self._of_active(self.mix_experts)

    def _of_active(self, found: nn.ModuleDict) -> Any:
        return next((found[name] for name in self.active_adapters if name in found), None)

    def update_layer(
        self, adapter: str, config: MixtureOfLoraConfig, plain: bool, routed: bool
    ) -> None:
        """Adds an adapter: its experts and, if ``routed``, a router of its own. ``plain``: one
        LoRA without a router.
        """
        self.configs[adapter] = config
        experts, d_router = self.make_experts(config, plain)
        self.mix_experts[adapter] = experts
        if routed and not plain and config.router is not None:
            router: Any = config.make_router(d_router)
            if absent := (config.absent_experts or {}).get(self.name):
                exclude(router, absent, self.name)
            self.mix_router[adapter] = router
            router.train(self.training)
        experts.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter)
        if not config.train_experts:
            self.frozen_peft_weight_names[adapter] = ("mix_experts",)
        self.set_adapter(self.active_adapters)

    def make_experts(self, config: MixtureOfLoraConfig, plain: bool) -> tuple[nn.Module, int]:
        """Fresh experts, and the width of what their router reads."""
        raise TypeError(f"{type(self).__name__} does not define make_experts")

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        device = device or next(self.base_layer.parameters()).device
        for part in (self.mix_experts, self.mix_router):
            if adapter_name in part and not any(p.is_meta for p in part[adapter_name].parameters()):
                part[adapter_name].to(device)  # float32, whatever the base model is kept in

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter the active one; several at a time are refused."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(f"set_adapter({names}): one mixture can be active at a time")
        super().set_adapter(names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see the message."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Refused: nothing was ever merged."""
        raise ValueError(CANNOT_MERGE)

    def active(self) -> str | None:
        """The adapter that this layer applies now; None where it leaves the base layer alone."""
        if self.disable_adapters:
            return None
        return next((name for name in self.active_adapters if name in self.mix_experts), None)

    def context(self, num_tokens: int) -> RoutingContext:
        """The context of this pass, as seen by this layer."""
        context = self.state.current
        if context is None:
            raise ValueError(
                f"{self.name}: called outside its model; call the whole adapted model, which tells "
                "its layers the shape of the batch"
            )
        if context.batch_size * context.sequence_length != num_tokens:
            raise ValueError(
                f"{self.name}: sees {num_tokens} tokens, the batch has {context.batch_size} x "
                f"{context.sequence_length}; only modules that see every token can be adapted"
            )
        return context.at_layer(self.number)

    def route(
        self, adapter: str, x: Float[Tensor, "T D"], context: RoutingContext
    ) -> RouterOutput | None:
        """What the router of this layer, or of its block, decides; None for plain LoRA."""
        if self.configs[adapter].router_scope == "block" and self.experts.num_experts > 1:
            if self.block not in self.state.block_records:
                if adapter not in self.mix_router:
                    raise ValueError(
                        f"{self.name}: runs before the first linear of {self.block}, which has the "
                        "router of the block; use router_scope='linear'"
                    )
                self.state.block_records[self.block] = self.decide(adapter, x, context)
            return self.state.block_records[self.block]
        return self.decide(adapter, x, context) if adapter in self.mix_router else None

    def decide(
        self, adapter: str, x: Float[Tensor, "T D"], context: RoutingContext
    ) -> RouterOutput:
        """What the router of this layer decides on ``x``; the record is kept."""
        router: Any = self.mix_router[adapter]
        if getattr(router, "granularity", None) == "sequence":
            context = with_prompt_embedding(self.state, self.name, x, context)
        output = router(x, context)
        self.state.keep(self.name, output)
        return output


class MixtureLinear(nn.Module, MixtureLayer):
    """``W x`` plus the mixture (see `MixtureOfLoraConfig`); a fresh one adds exactly 0.

    Args:
        base_layer: the frozen linear, or any module of one weight that maps [B S I] to [B S O].
        d_in, d_out: I and O.
    """

    forms = ("lora", "shared_a", "core")

    def __init__(
        self, base_layer: nn.Module, d_in: int, d_out: int, name: str, block: str,
        state: RoutingState,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        MixtureLayer.__init__(self, base_layer, name, block, state)
        self.in_features, self.out_features = d_in, d_out

    def make_experts(self, config: MixtureOfLoraConfig, plain: bool) -> tuple[nn.Module, int]:
        """Experts of the form that the config asks for."""
        num_experts = 1 if plain else config.num_experts
        make: Callable[..., nn.Module] = LoraExperts
        knobs: dict[str, Any] = {"scaling": config.scaling, "dropout": config.lora_dropout}
        d_router = self.in_features
        if plain:
            knobs["scaling"] = config.plain_scaling
        elif config.experts == "shared_a":
            make = SharedAExperts
            knobs["per_expert_dropout"] = config.dropout_per_expert
        elif config.experts == "core":
            make = CoreExperts
            knobs["core_dropout"] = config.core_dropout
            d_router = config.r if config.core_router else d_router
        experts = make(self.in_features, self.out_features, num_experts, config.r, **knobs)
        return experts, d_router

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the base layer plus that of the active adapter."""
        y = self.base_layer(x, *args, **kwargs)
        adapter = self.active()
        if adapter is None:
            return y
        tokens = x.reshape(-1, x.shape[-1])
        if not torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(next(self.mix_experts[adapter].parameters()).dtype)
        return add_product(y, *self._factors(adapter, tokens))

    def _factors(
        self, adapter: str, tokens: Float[Tensor, "T I"]
    ) -> tuple[Float[Tensor, "T R"], Float[Tensor, "O R"], int | float]:
        """Codes of tokens, what takes them to the output, and s."""
        experts: Any = self.mix_experts[adapter]
        context = self.context(len(tokens))
        if not isinstance(experts, CoreExperts) or not self.configs[adapter].core_router:
            weights = self._weights(adapter, tokens, context)
            codes, up = experts.factors(tokens, weights, context)
            return codes, up, experts.scaling
        codes = experts.encode(tokens, context)
        mixed = experts.mix(codes, self._weights(adapter, codes, context), context)
        return mixed, experts.lora_B, experts.scaling

    def _weights(
        self, adapter: str, x: Float[Tensor, "T D"], context: RoutingContext
    ) -> Float[Tensor, "T E"] | None:
        output = self.route(adapter, x, context)
        return None if output is None else mixing_weights(output)


def exclude(router: Any, absent: list[int], name: str) -> None:
    """Tells a router that experts have no weights in a layer; refuses routers that cannot know."""
    if not hasattr(router, "exclude"):
        raise ValueError(
            f"{name}: experts {absent} have no weights here, and {type(router).__name__} cannot "
            "leave experts out; use router=lora_mixer, or adapters with the same targets"
        )
    router.exclude(absent)
