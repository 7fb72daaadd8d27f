"""MixLoRA: feed-forward experts that share the frozen weights and differ by LoRAs inside."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.adapters.config import MixtureOfLoraConfig
from routerlab.adapters.experts import Dropout, kaiming_, mixing_weights
from routerlab.adapters.layer import MixtureLayer
from routerlab.adapters.state import RoutingState
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.grouped_mm import grouped_mm
from routerlab.ops.permute import combine, gather, sort_by_expert

# How models call the linears of their feed-forward network: (gate or None, up, down).
LINEARS = (
    ("gate_proj", "up_proj", "down_proj"),
    (None, "up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


def linears_of(module: nn.Module, whole: bool = False) -> tuple[str | None, str, str] | None:
    """The names of gate, up and down in a feed-forward network; None if it is not one we know.
    ``whole``: nor if it holds other weights, whose use we do not know (OPT's layers hold theirs
    beside the attention).
    """
    for names in LINEARS:
        if all(isinstance(getattr(module, n, None), nn.Module) for n in names if n is not None):
            known = any(callable(getattr(module, name, None)) for name in _ACTIVATIONS)
            parts = (part for name, part in module.named_children() if name not in names)
            alone = not any(True for part in parts for _ in part.parameters())
            return names if known and (alone or not whole) else None
    return None


class FeedForwardExperts(nn.Module):
    """The LoRA factors of E experts for each linear of the network.

    Args:
        widths: ``{"up": (D, F), "down": (F, D)}`` and ``gate`` where there is one.
    """

    def __init__(
        self,
        widths: dict[str, tuple[int, int]],
        num_experts: int,
        r: int,
        scaling: int | float,
        dropout: int | float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts, self.r, self.scaling = num_experts, r, scaling
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, (d_in, d_out) in widths.items():
            self.lora_A[name] = nn.Parameter(kaiming_(torch.empty(num_experts, r, d_in), d_in))
            self.lora_B[name] = nn.Parameter(torch.zeros(num_experts, d_out, r))
        self.dropout = Dropout(dropout)


class MixtureFeedForward(nn.Module, MixtureLayer):
    r"""``sum_i w_i E_i(h) + (1 - sum_i w_i) FFN(h)`` (MixLoRA, arXiv 2404.15159).

    :math:`E_i(h) = W_2' (act(W_1' h) * W_3' h)` with :math:`W_j' u = W_j u + s B_{j,i} A_{j,i} u`:
    the LoRAs are inside the nonlinearity. The weights of MixLoRA sum to 1 and the second term is
    gone; with routers whose weights do not, or that drop tokens, it keeps the frozen network whole
    [reconstructed]. The frozen products are computed once: the first two before the experts split
    up, the last, which is linear, after their hidden rows are mixed.
    """

    forms = ("feed_forward",)

    def __init__(
        self, base_layer: nn.Module, widths: dict[str, tuple[int, int]],
        names: tuple[str | None, str, str], name: str, block: str, state: RoutingState,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        MixtureLayer.__init__(self, base_layer, name, block, state)
        self.widths, self.names = widths, names
        self.in_features, self.out_features = widths["up"][0], widths["down"][1]

    def make_experts(self, config: MixtureOfLoraConfig, plain: bool) -> tuple[nn.Module, int]:
        """Factors for all linears; the router reads the input of the network."""
        experts = FeedForwardExperts(
            self.widths, config.num_experts, config.r, config.scaling, config.lora_dropout
        )
        return experts, self.in_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the mixture, of the shape of ``x``."""
        adapter = self.active()
        if adapter is None:
            return self.base_layer(x, *args, **kwargs)
        tokens = x.reshape(-1, x.shape[-1])
        experts: Any = self.mix_experts[adapter]
        context = self.context(len(tokens))
        own = tokens
        if not torch.is_autocast_enabled(x.device.type):
            own = tokens.to(next(experts.parameters()).dtype)
        output = self.route(adapter, own, context)
        if output is None:
            raise ValueError(f"{self.name}: feed-forward experts need a router")
        y = self._mix(tokens, own, output, experts, context).to(x.dtype).view_as(x)
        dropout = getattr(self.base_layer, "dropout", None)  # GPT-2's network ends in one
        return dropout(y) if isinstance(dropout, nn.Dropout) else y

    def _mix(
        self,
        tokens: Float[Tensor, "T D"],
        own: Float[Tensor, "T D"],
        output: RouterOutput,
        experts: Any,
        context: RoutingContext,
    ) -> Float[Tensor, "T D"]:
        gate, up, down = (getattr(self.base_layer, n or "", None) for n in self.names)
        assert down is not None
        by = sort_by_expert(output)
        weights = by.sort(output.combine_weights)[:, None]
        dropped = experts.dropout(own, context)
        frozen, rows = {}, {}
        for kind, linear in (("gate", gate), ("up", up)):
            if linear is not None:
                frozen[kind] = linear(tokens)
                rows[kind] = gather(frozen[kind], by) + self._delta(experts, kind, dropped, by)
        hidden = self._activate(rows) * weights.to(rows["up"].dtype)
        left = 1 - mixing_weights(output).sum(1, keepdim=True)
        base = self._activate(frozen)
        mixed = combine(hidden, by) + left.to(base.dtype) * base
        y = down(mixed.to(tokens.dtype))
        mask = experts.dropout.mask((1, *base.shape), hidden, context, "hidden")
        if mask is not None:
            hidden = hidden * mask[0].index_select(0, by.tokens)
        codes = grouped_mm(hidden.to(own.dtype), experts.lora_A["down"], by.tokens_per_expert)
        places = (by.tokens, output.expert_indices.index_select(0, by.order))
        spread = codes.new_zeros(len(tokens), experts.num_experts, experts.r)
        spread = spread.index_put(places, codes, accumulate=True).flatten(1)
        up_again = experts.lora_B["down"].transpose(0, 1).flatten(1)
        return y + (experts.scaling * F.linear(spread, up_again)).to(y.dtype)

    def _delta(self, experts: Any, kind: str, x: Tensor, by: Any) -> Float[Tensor, "N F"]:
        """s B_i A_i x of each assignment, for one of the first two linears."""
        codes = F.linear(x, experts.lora_A[kind].flatten(0, 1))
        codes = codes.view(len(x), experts.num_experts, experts.r)
        expert = torch.arange(experts.num_experts, device=x.device)
        expert = expert.repeat_interleave(by.tokens_per_expert)
        picked = codes[by.tokens, expert]
        return experts.scaling * grouped_mm(picked, experts.lora_B[kind], by.tokens_per_expert)

    def _activate(self, products: dict[str, Tensor]) -> Tensor:
        found = next(n for n in _ACTIVATIONS if callable(getattr(self.base_layer, n, None)))
        act = getattr(self.base_layer, found)
        if "gate" in products:
            return act(products["gate"]) * products["up"]
        return act(products["up"])
