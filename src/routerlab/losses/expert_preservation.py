"""Expert preservation: imported experts stay near what they were."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from routerlab.core.checks import within
from routerlab.core.routing import RoutingContext


class ExpertPreservationLoss:
    r""":math:`\sum_{i \in C} \lVert \theta_i - \theta_i^{(0)} \rVert_2^2` of one layer (LoRA-Mixer,
    arXiv 2507.00029): how far the experts C have moved from the trained ones that they were
    imported from. Its weight is the paper's beta, which is not given there.

    Args:
        weight: of the loss.
        experts: numbers of the experts to protect; None: all.

    Raises:
        ValueError: the layer's experts were not imported, do not train, or are fewer.
    """

    def __init__(self, weight: float = 0.01, experts: list[int] | None = None) -> None:
        within("weight", weight, 0)
        self.weight, self.experts = weight, experts

    def of_layer(self, layer: Any, context: RoutingContext | None = None) -> Float[Tensor, ""]:
        """The loss of a layer."""
        reference = getattr(layer.experts, "reference", None)
        if reference is None:
            raise ValueError(
                "expert_preservation: experts must be imported (adapter.experts_from) and train "
                "(adapter.train_experts=true)"
            )
        count = layer.experts.num_experts
        chosen = list(range(count)) if self.experts is None else self.experts
        if not all(0 <= expert < count for expert in chosen):
            raise ValueError(f"experts={chosen}: must be from 0 to {count - 1}")
        moved = [
            (parameter[chosen] - reference[name].to(parameter.device)[chosen]).square().sum()
            for name, parameter in layer.experts.named_parameters()
        ]
        return torch.stack(moved).sum()
