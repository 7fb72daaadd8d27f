"""The experts of transformers behind our own dispatch."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations import moe

from routerlab.core.routing import RouterOutput
from routerlab.ops.grouped_mm import grouped_mm

NAME = "routerlab"  # of our function among those by which transformers computes experts


class HuggingFaceExperts(nn.Module):
    """The stacked experts of a block of transformers, called as ours are. Weights stay where they
    are; ``gate_up_proj`` and ``down_proj`` are theirs where they have our layout ([E, 2F, D] with
    gate rows first, and [E, D, F]).

    Args:
        source: the module that holds them.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source: Any = source
        self.num_experts: int = self.source.num_experts

    @property
    def gate_up_proj(self) -> Tensor:
        """[E, 2F, D]; AttributeError for experts of another layout."""
        return self._ours("gate_up_proj")

    @property
    def down_proj(self) -> Tensor:
        """[E, D, F]; AttributeError for experts of another layout."""
        return self._ours("down_proj")

    @property
    def swiglu_weights(self) -> tuple[Tensor, Tensor] | None:
        """Both stacks of weights where they are in our layout and compute a plain SwiGLU."""
        source = self.source
        plain = isinstance(source.act_fn, nn.SiLU | SiLUActivation) and not source.has_bias
        gated = type(source)._apply_gate is moe._default_apply_gate
        ours = plain and gated and not source.is_transposed and source.is_concatenated
        return (source.gate_up_proj, source.down_proj) if ours else None

    def forward(
        self,
        x: Float[Tensor, "N D"],
        tokens_per_expert: Int[Tensor, "E"],
        combine_weights: Float[Tensor, "N"],
    ) -> Float[Tensor, "N D"]:
        """Weighted outputs of rows sorted by expert, ``tokens_per_expert`` rows for each."""
        hidden = self.source._apply_gate(self._linear("gate_up_proj", x, tokens_per_expert))
        y = self._linear("down_proj", hidden, tokens_per_expert)
        return y * combine_weights.to(y.dtype)[:, None]

    def expert(
        self, index: int, x: Float[Tensor, "n D"], combine_weights: Float[Tensor, "n"]
    ) -> Float[Tensor, "n D"]:
        """Weighted outputs of one expert."""
        counts = torch.zeros(self.num_experts, dtype=torch.long, device=x.device)
        counts[index] = len(x)
        return self(x, counts, combine_weights)

    def _linear(self, name: str, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        weight = getattr(self.source, name)
        if self.source.is_transposed:
            weight = weight.transpose(1, 2)
        y = grouped_mm(x, weight, tokens_per_expert)
        if self.source.has_bias:
            bias = getattr(self.source, f"{name}_bias")
            y = y + bias.to(y.dtype).repeat_interleave(tokens_per_expert, 0, output_size=len(y))
        return y

    def _ours(self, name: str) -> Tensor:
        source = self.source
        if getattr(source, "is_transposed", True) or not source.is_concatenated:
            raise AttributeError(f"{type(source).__name__}: {name} is laid out in another way")
        return getattr(source, name)


def check_experts(experts: nn.Module, name: str) -> None:
    """Raises ValueError, with ``name``, for experts that cannot be given our records."""
    known = getattr(experts, "has_gate", False) and hasattr(experts, "_apply_gate")
    if not known or getattr(experts, "has_post_expert_norm", False):
        raise ValueError(
            f"{name}: {type(experts).__name__} is of no family whose routers can be replaced; it "
            "must be gated, with stacked weights and without a norm of its own; use router=native"
        )


def apply_record(
    experts: Any, hidden: Tensor, record: RouterOutput, combine_weights: Tensor
) -> Tensor:
    """What transformers calls where a router of ours stands in a block: that router's record is
    passed on as indices, and holds the combine weights as well. ``experts.dispatch`` is ours, too.
    """
    return experts.dispatch(hidden, record, HuggingFaceExperts(experts))


moe.ALL_EXPERTS_FUNCTIONS.register(NAME, apply_record)
