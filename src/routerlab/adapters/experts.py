"""LoRA experts of one linear: stacked factors, mixed without a loop over experts.

`factors` gives the weighted codes of tokens and the matrix that takes them to the output; the layer
adds their product times s to that of the frozen linear (`add_product`). ``weights`` None: every
expert counts 1.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.core.seeding import stable_seed


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


def add_product(
    y: Float[Tensor, "*B O"],
    codes: Float[Tensor, "T R"],
    up: Float[Tensor, "O R"],
    scale: int | float,
) -> Float[Tensor, "*B O"]:
    """``y + scale * codes up^T``, with y [... O] of T rows: in one operation where the types agree,
    since what is as large as y costs more than the arithmetic.
    """
    if y.dtype == codes.dtype and (y.dtype == up.dtype or torch.is_autocast_enabled(y.device.type)):
        return torch.addmm(y.reshape(-1, y.shape[-1]), codes, up.t(), alpha=scale).view(y.shape)
    return y + (scale * F.linear(codes, up)).to(y.dtype).view(y.shape)


class Dropout(nn.Module):
    """Inverted dropout whose mask comes from the context: a layer that runs again draws the same
    mask, and the samples of a policy share one, since a mask of its own would enter a sample's
    reward. Masks are independent of what routers draw, and of each other if of another ``use``.
    """

    def __init__(self, p: int | float) -> None:
        super().__init__()
        self.p = p

    def forward(
        self, x: Tensor, context: RoutingContext, draws: int = 1, use: str = "input"
    ) -> Tensor:
        """``x`` [T ...] under a mask, or [draws T ...] under as many masks."""
        mask = self.mask((draws, *x.shape), x, context, use)
        if mask is None:
            return x if draws == 1 else x.expand(draws, *x.shape)
        return x * (mask[0] if draws == 1 else mask)

    def mask(
        self, shape: tuple[int, ...], like: Tensor, context: RoutingContext, use: str
    ) -> Tensor | None:
        """Factors [draws T ...], 0 or 1 / (1 - p), of the type of ``like``; None: no dropout."""
        if not self.training or self.p == 0:
            return None
        blocks = context.num_replicas
        seed = stable_seed("dropout", use, context.seed, context.layer)
        generator = torch.Generator(like.device).manual_seed(seed)
        once = (shape[0], shape[1] // blocks, *shape[2:])
        keep = torch.rand(once, generator=generator, device=like.device) >= self.p
        return keep.repeat(1, blocks, *(1 for _ in shape[2:])).to(like.dtype) / (1 - self.p)


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
        self,
        d_in: int,
        d_out: int,
        num_experts: int,
        r: int,
        scaling: int | float,
        dropout: int | float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts, self.r, self.scaling = num_experts, r, scaling
        self.lora_A = nn.Parameter(kaiming_(torch.empty(num_experts, r, d_in), d_in))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, d_out, r))
        self.dropout = Dropout(dropout)

    def factors(
        self, x: Tensor, weights: Tensor | None, context: RoutingContext
    ) -> tuple[Float[Tensor, "T R"], Float[Tensor, "O R"]]:
        """Weighted codes, and what takes them to the output; s is still to be applied."""
        codes = F.linear(self.dropout(x, context), self.lora_A.flatten(0, 1))
        if weights is not None:
            codes = codes.view(-1, self.num_experts, self.r) * weights[:, :, None].to(codes.dtype)
        return codes.reshape(len(x), -1), self.lora_B.transpose(0, 1).flatten(1)

    def set_expert(self, index: int, a: Float[Tensor, "k I"], b: Float[Tensor, "O k"]) -> None:
        """Expert ``index`` computes ``b a x`` when it counts 1; ranks k below r are filled up."""
        rank = len(a)
        with torch.no_grad():
            self.lora_A[index].zero_()[:rank] = a
            self.lora_B[index].zero_()[:, :rank] = b / self.scaling

    def remember(self) -> None:
        """Keeps the factors as they are now in ``reference``: what training may move away from."""
        self.reference = {name: p.detach().clone() for name, p in self.named_parameters()}


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
        scaling: int | float,
        dropout: int | float = 0.0,
        per_expert_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.r, self.scaling = num_experts, r, scaling
        self.per_expert_dropout = per_expert_dropout
        self.lora_A = nn.Parameter(kaiming_(torch.empty(r, d_in), d_in))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, d_out, r))
        self.dropout = Dropout(dropout)

    def factors(
        self, x: Tensor, weights: Tensor | None, context: RoutingContext
    ) -> tuple[Float[Tensor, "T R"], Float[Tensor, "O R"]]:
        """Weighted codes, and what takes them to the output; s is still to be applied."""
        draws = self.num_experts if self.per_expert_dropout else 1
        codes = F.linear(self.dropout(x, context, draws), self.lora_A)
        codes = codes.transpose(0, 1) if draws > 1 else codes[:, None]  # [T E or 1, r]
        if weights is None:
            codes = codes.expand(-1, self.num_experts, -1)
        else:
            codes = codes * weights[:, :, None].to(codes.dtype)
        return codes.reshape(len(x), -1), self.lora_B.transpose(0, 1).flatten(1)


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
        scaling: int | float,
        dropout: int | float = 0.0,
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

    def mix(
        self, codes: Tensor, weights: Tensor | None, context: RoutingContext
    ) -> Float[Tensor, "T r"]:
        """(sum_i w_i M_i) applied to codes."""
        if weights is None:
            weights = torch.ones(len(codes), self.num_experts, device=codes.device)
        weights = weights.to(codes.dtype)
        if self.core_dropout and self.training and self.dropout.p:
            merged = torch.einsum("te,eqr->tqr", weights, self.lora_core.to(codes.dtype))
            merged = self.dropout(merged, context, use="core")
            mixed = torch.einsum("tqr,tr->tq", merged, codes)
            mixed = self.dropout(mixed, context, use="mixed")
        else:
            outputs = F.linear(codes, self.lora_core.flatten(0, 1))
            outputs = outputs.view(-1, self.num_experts, self.r)
            mixed = (outputs * weights[:, :, None]).sum(1)
        return mixed

    def factors(
        self, x: Tensor, weights: Tensor | None, context: RoutingContext
    ) -> tuple[Float[Tensor, "T r"], Float[Tensor, "O r"]]:
        """Mixed codes, and what takes them to the output; s is still to be applied."""
        return self.mix(self.encode(x, context), weights, context), self.lora_B
