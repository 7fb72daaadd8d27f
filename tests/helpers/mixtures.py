"""Adapted layers on their own and whole adapted models, and a router that does as it is told."""

from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from routerlab.adapters import MixtureOfLoraConfig
from routerlab.adapters.layer import MixtureLayer, MixtureLinear
from routerlab.adapters.state import RoutingState
from routerlab.core.routing import RouterOutput, RoutingContext

SOFT = {"_target_": "routerlab.routers.soft.SoftRouter", "init_std": 1.0}
TOP_2 = {
    "_target_": "routerlab.routers.token_choice.TokenChoice",
    "top_k": 2,
    "order": "top_k_first",
    "init_std": 1.0,
}


class Told(nn.Module):
    """Gives token t the weights ``weights[t]``: any number of experts, none where they are 0, and
    the assignments in any order, as experts that choose tokens leave them.
    """

    def __init__(self, weights: Float[Tensor, "T E"]) -> None:
        super().__init__()
        self.weights, self.num_experts = weights, weights.shape[1]
        self.seen: Tensor | None = None

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        self.seen = x
        logits = torch.zeros_like(self.weights).detach()
        mask = self.weights.detach() != 0
        if context is not None and context.valid is not None:
            mask = mask & context.valid[:, None]
        tokens, experts = mask.nonzero(as_tuple=True)
        order = torch.randperm(len(tokens))
        tokens, experts = tokens[order], experts[order]
        return RouterOutput(
            router_logits=logits,
            router_probs=logits.softmax(-1),
            token_indices=tokens,
            expert_indices=experts,
            combine_weights=self.weights[tokens, experts],
            dropped_per_expert=torch.zeros(self.num_experts, dtype=torch.long),
        )


def uneven_weights(num_tokens: int, num_experts: int) -> Float[Tensor, "T E"]:
    """Weights that do not sum to 1; the first token has no expert, the second has all."""
    weights = torch.rand(num_tokens, num_experts, dtype=torch.float64) + 0.1
    keep = torch.rand(num_tokens, num_experts) < 0.5
    keep[0], keep[1] = False, True
    return (weights * keep).requires_grad_()


def stir(module: nn.Module, std: float = 0.3) -> None:
    """Gives every B of LoRAs, which starts at 0, something to say."""
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)


def lone_linear(
    config: MixtureOfLoraConfig, d_in: int = 6, d_out: int = 5, router: nn.Module | None = None
) -> MixtureLinear:
    """An adapted linear in float64 that belongs to no model."""
    layer = MixtureLinear(
        nn.Linear(d_in, d_out).requires_grad_(False), d_in, d_out, "layers.00.up", "layers.00",
        RoutingState(),
    )  # fmt: skip
    return finished(layer, config, router)


def finished(layer: Any, config: MixtureOfLoraConfig, router: nn.Module | None = None) -> Any:
    """A fresh adapted layer with its adapter, and maybe another router, in float64."""
    layer.set_adapter(["default"])
    layer.update_layer("default", config, plain=False, routed=True)
    if router is not None:
        layer.mix_router["default"] = router
    stir(layer)
    return layer.double()


def call(
    layer: MixtureLayer, x: Float[Tensor, "T I"], context: RoutingContext | None = None
) -> Float[Tensor, "T O"]:
    """The layer's output for the tokens of one pass (by default one sequence)."""
    layer.state.current = RoutingContext(1, len(x)) if context is None else context
    return layer(x)  # type: ignore[operator]


def mixture(base: nn.Module, dtype: torch.dtype = torch.float64, **config: Any) -> PeftModel:
    """An adapted model whose LoRAs say something."""
    model: Any = get_peft_model(base, MixtureOfLoraConfig(**config))  # type: ignore[arg-type]
    stir(model)
    return model.to(dtype)


def layers_of(model: Any) -> dict[str, Any]:
    """Its adapted layers by name."""
    return model.base_model.state.layers


def records_of(model: Any) -> dict[str, RouterOutput]:
    """What its routers decided in the last pass."""
    return model.base_model.state.records
