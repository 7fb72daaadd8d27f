"""How the routers of transformers make a choice of their logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

_PROBES = 64  # random tokens on which a law and a router must agree


@dataclass(frozen=True)
class Law:
    """What a family makes of logits in float32: bit for bit what its own router does (but for the
    sigmoids under autocast, which transformers takes in bfloat16).

    ``select(router, logits)`` gives the weights [T K] and the experts [T K]; ``probs(logits)`` the
    full distribution [T E] before the choice.
    """

    name: str
    select: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    probs: Callable[[Tensor], Tensor]


def law_of(router: Any, name: str) -> Law:
    """The law by which a router of transformers makes ``(logits, weights, experts)`` of tokens,
    found by trying all that are known on random tokens and random gates. Raises ValueError, with
    ``name``, if it follows none of them.
    """
    try:
        logits, weights, experts = _probe(router)
        for law in LAWS:
            if (found := _tried(law, router, logits.float())) is None:
                continue
            if torch.equal(found[1], experts) and torch.equal(found[0].to(weights.dtype), weights):
                return law
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{_unknown(router, name)}: {error}") from error
    raise ValueError(_unknown(router, name))


def _tried(law: Law, router: Any, logits: Float[Tensor, "T E"]) -> tuple[Tensor, Tensor] | None:
    """A law's choice; None for a router that has not what the law goes by."""
    try:
        return law.select(router, logits)
    except AttributeError:
        return None


@torch.no_grad()
def _probe(router: Any) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(router.weight.device)

    gate = {name: draw(*p.shape) for name, p in router.named_parameters()}
    width = router.weight.shape[1]
    return functional_call(router, gate, (draw(_PROBES, width) * width**-0.5,))


def _unknown(router: Any, name: str) -> str:
    return (
        f"{name}: {type(router).__name__} is of no family that is known here; it must return "
        f"(logits, weights, experts), and choose by one of: {'; '.join(law.name for law in LAWS)}"
    )


def _softmax(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    return logits.softmax(-1)


def _normalised_sigmoid(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    return F.logsigmoid(logits).softmax(-1)  # also where all scores underflow


def _softmax_top_k(
    router: Any, logits: Float[Tensor, "T E"]
) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """OLMoE and Qwen without ``norm_topk_prob``."""
    weights, experts = logits.softmax(-1).topk(router.top_k, dim=-1)
    return weights, experts


def _normalised_top_k(
    router: Any, logits: Float[Tensor, "T E"]
) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """Mixtral; OLMoE and Qwen with ``norm_topk_prob``."""
    weights, experts = logits.softmax(-1).topk(router.top_k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), experts


def _top_k_softmax(
    router: Any, logits: Float[Tensor, "T E"]
) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """gpt-oss."""
    values, experts = logits.topk(router.top_k, dim=-1)
    return values.softmax(-1), experts


def _biased_sigmoid(
    router: Any, logits: Float[Tensor, "T E"]
) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """DeepSeek-V3 and GLM4: sigmoids, chosen with a bias and within the best groups of experts."""
    scores = logits.sigmoid()
    ranked = scores + router.e_score_correction_bias
    groups = getattr(router, "num_group", 1)
    if groups > 1:
        grouped = ranked.view(len(ranked), groups, -1)
        of_group = grouped.topk(2, dim=-1)[0].sum(-1)
        best = of_group.topk(router.topk_group, dim=-1, sorted=False)[1]
        open_ = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best, True)
        ranked = grouped.masked_fill(~open_[..., None], -torch.inf).view_as(ranked)
    experts = ranked.topk(router.top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, experts)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * router.routed_scaling_factor, experts


LAWS = (
    Law("softmax, then top-k", _softmax_top_k, _softmax),
    Law("softmax, then top-k, renormalised", _normalised_top_k, _softmax),
    Law("top-k, then softmax", _top_k_softmax, _softmax),
    Law("top-k of biased sigmoids", _biased_sigmoid, _normalised_sigmoid),
)
