"""LoRA experts of one linear: stacked factors, mixed without a loop over experts."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.core.routing import RouterOutput, RoutingContext


def mixing_weights(output: RouterOutput) -> Float[Tensor, "T E"]:
    """The combine weight of every expert for every token, 0 where it was not chosen."""
    empty = torch.zeros_like(output.router_logits)
    weights = output.combine_weights.to(empty.dtype)
    if output.top_k is not None:
        picks = output.expert_indices.view(-1, output.top_k)
        return empty.scatter(1, picks, weights.view_as(picks))
    places = (output.token_indices, output.expert_indices)
    return empty.index_put(places, weights, accumulate=True)


def kaiming_(weight: Tensor, fan_in: int) -> Tensor:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): Kaiming uniform with a = sqrt(5)."""
    return nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


class Dropout(nn.Module):
    """Inverted dropout whose mask comes from the context: a layer that runs again draws the same
    mask, and the samples of a policy share one, since a mask of its own would enter a sample's
    reward.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, context: RoutingContext, draws: int = 1) -> Tensor:
        """``x`` [T ...] under a mask, or [draws T ...] under as many masks."""
        if not self.training or self.p == 0:
            return x if draws == 1 else x.expand(draws, *x.shape)
        blocks = context.num_replicas
        shape = (draws, len(x) // blocks, *x.shape[1:])
        generator = context.generator(x.device)
        keep = torch.rand(shape, generator=generator, device=x.device) >= self.p
        keep = keep.repeat(1, blocks, *(1 for _ in x.shape[1:]))
        dropped = x * keep.to(x.dtype) / (1 - self.p)
        return dropped[0] if draws == 1 else dropped


class LoraExperts(nn.Module):
    r"""E LoRAs: ``x -> s sum_i w_i B_i A_i x``, in two matrix products.

    The products run over all experts, and weights of 0 cut out those not chosen: with ranks this
    small that beats gathering tokens by expert. The cost grows with E r.

    Args:
        d_in, d_out: widths of the adapted linear.
        num_experts: E.
        r: rank.
        scaling: s.
        dropout: on x.
    """

    def __init__(
        self, d_in: int, d_out: int, num_experts: int, r: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_experts, self.r, self.scaling = num_experts, r, scaling
        self.lora_A = nn.Parameter(kaiming_(torch.empty(num_experts, r, d_in), d_in))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, d_out, r))
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "T I"],
        weights: Float[Tensor, "T E"] | None,
        context: RoutingContext,
    ) -> Float[Tensor, "T O"]:
        """The weighted sum of the experts; ``weights`` None: every expert counts 1."""
        codes = F.linear(self.dropout(x, context), self.lora_A.flatten(0, 1))
        if weights is not None:
            codes = codes.view(-1, self.num_experts, self.r) * weights[:, :, None].to(codes.dtype)
        return self.scaling * F.linear(codes.reshape(len(x), -1), self._up())

    def set_expert(self, index: int, a: Float[Tensor, "k I"], b: Float[Tensor, "O k"]) -> None:
        """Expert ``index`` computes ``b a x`` when it counts 1; ranks k below r are filled up."""
        rank = len(a)
        with torch.no_grad():
            self.lora_A[index].zero_()[:rank] = a
            self.lora_B[index].zero_()[:, :rank] = b / self.scaling

    def _up(self) -> Float[Tensor, "O Er"]:
        return self.lora_B.transpose(0, 1).flatten(1)


class SharedAExperts(nn.Module):
    """E heads B_i on one A: ``x -> s sum_i w_i B_i A x`` (HydraLoRA, arXiv 2404.19245).

    Args:
        per_expert_dropout: each head sees x under a mask of its own, as in the authors' code (E
            times the memory and the first product); else all heads see one.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        num_experts: int,
        r: int,
        scaling: float,
        dropout: float = 0.0,
        per_expert_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.r, self.scaling = num_experts, r, scaling
        self.per_expert_dropout = per_expert_dropout
        self.lora_A = nn.Parameter(kaiming_(torch.empty(r, d_in), d_in))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, d_out, r))
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "T I"],
        weights: Float[Tensor, "T E"] | None,
        context: RoutingContext,
    ) -> Float[Tensor, "T O"]:
        """The weighted sum of the heads."""
        draws = self.num_experts if self.per_expert_dropout else 1
        codes = F.linear(self.dropout(x, context, draws), self.lora_A)
        codes = codes.transpose(0, 1) if draws > 1 else codes[:, None]  # [T E or 1, r]
        if weights is None:
            codes = codes.expand(-1, self.num_experts, -1)
        else:
            codes = codes * weights[:, :, None].to(codes.dtype)
        up = self.lora_B.transpose(0, 1).flatten(1)
        return self.scaling * F.linear(codes.reshape(len(x), -1), up)


class CoreExperts(nn.Module):
    """E matrices M_i between one A and one B: ``x -> s B (sum_i w_i M_i) A x`` (CoMoL, arXiv
    2603.00573). The outputs of the cores are mixed, which is the same function as mixing the cores
    and far smaller.

    Args:
        core_dropout: drops entries of each token's merged core and of its output, as in the
            authors' code; the merged cores [T, r, r] are then built.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        num_experts: int,
        r: int,
        scaling: float,
        dropout: float = 0.0,
        core_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.r, self.scaling = num_experts, r, scaling
        self.core_dropout = core_dropout
        self.lora_A = nn.Parameter(kaiming_(torch.empty(r, d_in), d_in))
        self.lora_core = nn.Parameter(kaiming_(torch.empty(num_experts, r, r), r))
        self.lora_B = nn.Parameter(torch.zeros(d_out, r))
        self.dropout = Dropout(dropout)

    def encode(self, x: Float[Tensor, "T I"], context: RoutingContext) -> Float[Tensor, "T r"]:
        """A x, the code that cores and router read."""
        return F.linear(self.dropout(x, context), self.lora_A)

    def decode(
        self,
        codes: Float[Tensor, "T r"],
        weights: Float[Tensor, "T E"] | None,
        context: RoutingContext,
    ) -> Float[Tensor, "T O"]:
        """s B (sum_i w_i M_i) applied to codes."""
        if weights is None:
            weights = torch.ones(len(codes), self.num_experts, device=codes.device)
        weights = weights.to(codes.dtype)
        if self.core_dropout and self.training and self.dropout.p:
            merged = torch.einsum("te,eqr->tqr", weights, self.lora_core.to(codes.dtype))
            mixed = torch.einsum("tqr,tr->tq", self.dropout(merged, context), codes)
            mixed = self.dropout(mixed, context.at_layer(-1 - context.layer))  # a mask of its own
        else:
            outputs = F.linear(codes, self.lora_core.flatten(0, 1))
            outputs = outputs.view(-1, self.num_experts, self.r)
            mixed = (outputs * weights[:, :, None]).sum(1)
        return self.scaling * F.linear(mixed, self.lora_B)

    def forward(
        self,
        x: Float[Tensor, "T I"],
        weights: Float[Tensor, "T E"] | None,
        context: RoutingContext,
    ) -> Float[Tensor, "T O"]:
        """The layer's addition to the frozen linear."""
        return self.decode(self.encode(x, context), weights, context)
