"""Prices of the balanced assignment: the dual of picking K experts a token at equal load."""

from bisect import insort

import torch
from jaxtyping import Float
from torch import Tensor


def solve_prices(
    scores: Float[Tensor, "T E"],
    start: Float[Tensor, "E"],
    top_k: int,
    iterations: int,
    clip: bool = True,
    midpoint: bool = False,
    subsample: int | None = None,
) -> Float[Tensor, "E"]:
    r"""Prices q of experts by alternating exact minimisation of the dual (arXiv 2502.15451)

    .. math:: \min_{p,q \ge 0} K \sum_t p_t + \tfrac{TK}{E} \sum_i q_i
              + \sum_{t,i} \max(0, s_{t,i} - p_t - q_i).

    With :math:`c = \lfloor TK/E \rfloor`, :math:`p_t` is the (K+1)-th largest of
    :math:`s_t - q` and :math:`q_i` the (c+1)-th largest of :math:`s_{\cdot,i} - p`, both at least 0
    if ``clip``. ``midpoint`` takes q half-way between the c-th and the (c+1)-th largest, which no
    token ties with. ``subsample`` reads at most so many evenly spaced tokens. Zero for K = E,
    ``start`` without tokens.
    """
    num_experts = scores.shape[1]
    if top_k == num_experts:
        return torch.zeros_like(start)
    if len(scores) == 0:
        return start
    if subsample is not None and len(scores) > subsample:
        places = torch.arange(subsample, device=scores.device) * len(scores) // subsample
        scores = scores[places]
    num_tokens = len(scores)
    slots = num_tokens * top_k // num_experts
    by_expert, prices = scores.T.contiguous(), start.to(scores.dtype)
    for _ in range(iterations):
        tokens = (scores - prices).topk(top_k + 1, dim=1).values[:, -1]
        if clip:
            tokens = tokens.clamp(min=0)
        surplus = by_expert - tokens
        prices = surplus.kthvalue(num_tokens - slots, dim=1).values  # the (slots+1)-th largest
        if midpoint and slots:
            prices = (prices + surplus.kthvalue(num_tokens - slots + 1, dim=1).values) / 2
        if clip:
            prices = prices.clamp(min=0)
    return prices


def online_prices(
    scores: Float[Tensor, "T E"], start: Float[Tensor, "E"], top_k: int, clip: bool = True
) -> Float[Tensor, "T E"]:
    """Prices that each token meets when tokens come one by one: token i is assigned with prices of
    tokens 1 to i, so no later token has a say (the online matching of arXiv 2502.15451).

    Each expert keeps the surplus ``s - p`` of the tokens so far, sorted; its price is the
    ``(floor(i K / E) + 1)``-th largest of them. Runs on the host, token by token.
    """
    num_tokens, num_experts = scores.shape
    if top_k == num_experts:
        return torch.zeros_like(scores)
    rows, prices = scores.tolist(), start.tolist()
    kept: list[list[float]] = [[] for _ in range(num_experts)]
    met = []
    for i, row in enumerate(rows, start=1):
        price = sorted((s - q for s, q in zip(row, prices, strict=True)), reverse=True)[top_k]
        price = max(0.0, price) if clip else price
        place = -(i * top_k // num_experts + 1)
        for expert, score in enumerate(row):
            insort(kept[expert], score - price)
            found = kept[expert][place]
            prices[expert] = max(0.0, found) if clip else found
        met.append(list(prices))
    return torch.tensor(met, dtype=scores.dtype, device=scores.device).view(num_tokens, num_experts)


def dual_objective(
    scores: Float[Tensor, "T E"],
    token_prices: Float[Tensor, "T"],
    prices: Float[Tensor, "E"],
    top_k: int,
) -> Float[Tensor, ""]:
    """The dual that `solve_prices` minimises; no balanced assignment scores above it."""
    num_tokens, num_experts = scores.shape
    surplus = (scores - token_prices[:, None] - prices).clamp(min=0).sum()
    load = num_tokens * top_k / num_experts
    return top_k * token_prices.sum() + load * prices.sum() + surplus
