"""The PEFT tuner: finds the modules to adapt, puts mixtures in their place, keeps their state."""

import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn

from routerlab.adapters import trained
from routerlab.adapters.config import MixtureOfLoraConfig
from routerlab.adapters.feed_forward import MixtureFeedForward, linears_of
from routerlab.adapters.layer import CANNOT_MERGE, MixtureLayer, MixtureLinear
from routerlab.adapters.skills import SkillLinear
from routerlab.adapters.state import RoutingState
from routerlab.adapters.targets import check_base, facts_of, find_targets, layer_name, widths_of


class MixtureOfLoraModel(BaseTuner):
    """A model with `MixtureLayer` in place of its target modules.

    ``state`` (a `RoutingState`) holds the records of the last forward pass, and takes the
    `RoutingContext` of the next one.
    """

    prefix = "mix_"
    tuner_layer_cls = MixtureLayer  # type: ignore[assignment]
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adds the adapter of ``peft_config``; where it is refused, the model stays as it was."""
        if "state" not in self.__dict__:
            self.state, self._targets_of = RoutingState(), {}
        config: Any = self.peft_config[adapter_name]
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        known = set(self.state.layers)
        if config._fresh:  # a config can be used for several models
            config.base_model, config.absent_experts = None, None
            if config.adapt:
                trained.take_over_shape(config)
        self._targets_of[adapter_name] = find_targets(model, config)
        check_base(model, config)
        config.base_model = facts_of(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._check_names(adapter_name)
            self._start_from_trained(adapter_name, config)
        except Exception:
            self._take_back(adapter_name, known)
            for parameter, learns in trainable:
                parameter.requires_grad_(learns)
            raise
        self.state.attach(model)

    def _check_names(self, adapter: str) -> None:
        """PEFT saves one adapter as all keys in which no other adapter's name is a part."""
        parts = {*MixtureLayer.adapter_layer_names}
        for layer in self.state.layers.values():
            for held in (layer.mix_experts, layer.mix_router):
                if adapter in held:
                    parts.update(*(key.split(".") for key in held[adapter].state_dict()))
        if taken := sorted(parts.intersection(self.peft_config)):
            raise ValueError(
                f"adapter name {taken[0]!r}: is that of a part of an adapter too, and its weights "
                "would not be told apart; choose another name"
            )

    def _start_from_trained(self, adapter: str, config: Any) -> None:
        layers = {n: layer for n, layer in self.state.layers.items() if adapter in layer.configs}
        if config._fresh and config.experts_from:
            trained.import_experts(layers, adapter, config)
        if config._fresh and config.adapt:
            trained.take_over_skills(layers, adapter, config)

    def _take_back(self, adapter: str, known: set[str]) -> None:
        """Removes an adapter of which some layers may have parts, and layers that are not known."""
        self._targets_of.pop(adapter, None)
        for name, layer in list(self.state.layers.items()):
            for held in (layer.mix_experts, layer.mix_router, layer.configs):
                if adapter in held:
                    del held[adapter]
            layer.frozen_peft_weight_names.pop(adapter, None)
            if name not in known:
                del self.state.layers[name]
        kept = list(self.state.layers.values())
        for name, module in list(self.model.named_modules()):
            if isinstance(module, MixtureLayer) and module not in kept:
                parent = self.model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], module.base_layer)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT looks for the name at the end or just before it; here it may be further in.
        for part in MixtureLayer.adapter_layer_names:
            key = key.replace(f".{part}.{adapter_name}.", f".{part}.")
        return key

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> MixtureOfLoraConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        if peft_config.plain_modules:
            plain = copy.copy(peft_config)
            plain.target_modules = set(peft_config.plain_modules)
            if found := check_target_module_exists(plain, key):
                return found
        return check_target_module_exists(peft_config, key)

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str = "",
        **kwargs: Any,
    ) -> None:
        plain = current_key not in self._targets_of[adapter_name]
        block = layer_name(current_key.rpartition(".")[0])
        owners = {
            layer.block for layer in self.state.layers.values() if adapter_name in layer.mix_router
        }
        routed = peft_config.router_scope == "linear" or block not in owners
        if isinstance(target, MixtureLayer):
            target.update_layer(adapter_name, peft_config, plain, routed)
            layer: Any = target
        else:
            layer = self._wrap(peft_config, target, current_key, block, plain)
            layer.set_adapter(self.active_adapters)
            layer.update_layer(adapter_name, peft_config, plain, routed)
            self._replace_module(parent, target_name, layer, target)
        if adapter_name not in self.active_adapters:
            for part in (layer.mix_experts, layer.mix_router):
                if adapter_name in part:
                    part[adapter_name].requires_grad_(False)

    def _wrap(
        self, config: MixtureOfLoraConfig, target: nn.Module, key: str, block: str, plain: bool
    ) -> nn.Module:
        name = layer_name(key)
        name = key if name in self.state.layers else name
        if config.experts == "feed_forward" and not plain:
            names = linears_of(target)
            assert names is not None
            widths = {
                kind: widths_of(getattr(target, linear))
                for kind, linear in zip(("gate", "up", "down"), names, strict=True)
                if linear is not None
            }
            return MixtureFeedForward(target, widths, names, name, block, self.state)  # type: ignore[arg-type]
        widths = widths_of(target)
        assert widths is not None
        make = SkillLinear if config.experts == "skills" else MixtureLinear
        return make(target, *widths, name, block, self.state)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        raise ValueError(CANNOT_MERGE)

    def unmerge_adapter(self) -> None:
        """Refused."""
        raise ValueError(CANNOT_MERGE)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        raise ValueError(CANNOT_MERGE)

    def unload(self) -> nn.Module:
        """The base model as it was."""
        self.state.detach(self.model)
        return super().unload()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; another one becomes the active one."""
        super().delete_adapter(adapter_name)
        self._targets_of.pop(adapter_name, None)
