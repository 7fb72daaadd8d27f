"""BIP: prices from the balanced assignment problem of the batch itself."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from routerlab.core.checks import choice, within
from routerlab.core.routing import RoutingContext
from routerlab.ops.assignment_duals import online_prices, solve_prices


class BIP(nn.Module):
    r"""Balance from the first step on: experts are picked by :math:`s - q`, with prices q that
    solve each batch's assignment problem approximately (Sun, arXiv 2502.15451).

    Combine weights stay those of the unbiased scores. The problem, its dual and the updates are in
    `routerlab.ops.assignment_duals`. Evaluation uses the prices of the last step and solves
    nothing [reconstructed: the paper does not say].

    ``mode`` says which tokens have a say in a token's choice during training:

    - ``batch`` (the paper): prices are solved on the micro-batch, then used on it. **A token's
      choice depends on later tokens**: training looks ahead, evaluation does not, so a causal
      language model trains on choices that it will not meet;
    - ``causal``: the micro-batch is routed with the prices of the steps before, then solved. No
      leak; balance lags a step (Su, Quantile Balancing);
    - ``online``: tokens come one by one, in the order of the batch; a token's choice depends on the
      tokens before it, also of other sequences, and each micro-batch begins anew (the kept prices
      are those of its first token). A loop on the host: slow.

    Each micro-batch of each rank is a batch of its own; the kept prices are their mean
    [reconstructed].

    Args:
        num_experts: E.
        iterations: pairs of updates for each batch; with warm starts 1 to 4 are enough, from zero
            4 to 14.
        mode: ``batch``, ``causal`` or ``online``.
        clip: keep prices at 0 or more, as in the paper, which needs scores >= 0; false lifts
            starved experts too (the equality-constrained form, Quantile Balancing).
        midpoint: no token ties with a price (see `solve_prices`); false is the paper's convention.
        warm_start: begin with the kept prices instead of 0 [reconstructed].
        subsample: solve on at most so many evenly spaced tokens: cheaper, less exact; null: all.
    """

    causal = True
    prices: Tensor

    def __init__(
        self,
        num_experts: int,
        iterations: int = 4,
        mode: str = "batch",
        clip: bool = True,
        midpoint: bool = False,
        warm_start: bool = True,
        subsample: int | None = None,
    ) -> None:
        super().__init__()
        within("iterations", iterations, 1)
        choice("mode", mode, ("batch", "causal", "online"))
        if subsample is not None:
            within("subsample", subsample, 1)
        if mode == "online" and (subsample is not None or midpoint or iterations > 1):
            raise ValueError(
                "mode='online' takes tokens one by one: it needs iterations=1, midpoint=false and "
                f"subsample=null (got {iterations}, {midpoint}, {subsample})"
            )
        self.iterations, self.mode, self.clip = iterations, mode, clip
        self.midpoint, self.warm_start, self.subsample = midpoint, warm_start, subsample
        self.causal_training = mode != "batch"
        self.order_dependent = mode == "online"
        self.ties = mode != "causal" and not midpoint  # a price is some token's own surplus
        self.register_buffer("prices", torch.zeros(num_experts))

    @torch.no_grad()
    def forward(
        self, scores: Float[Tensor, "T E"], top_k: int, context: RoutingContext | None = None
    ) -> tuple[Tensor, Float[Tensor, "E"]]:
        """Minus the prices to route with ([E], or [T, E] online), and prices to keep. Padding has
        no say.
        """
        if not self.training:
            return -self.prices.to(scores.dtype), self.prices
        valid = None if context is None else context.valid
        real = scores if valid is None else scores[valid]
        start = self.prices if self.warm_start else torch.zeros_like(self.prices)
        if self.mode == "online":
            met = online_prices(real, start, top_k, self.clip)
            bias = torch.zeros_like(scores)
            bias[slice(None) if valid is None else valid] = -met
            return bias, (met[-1] if len(met) else start).to(self.prices.dtype)
        solved = solve_prices(
            real, start, top_k, self.iterations, self.clip, self.midpoint, self.subsample
        )
        used = solved if self.mode == "batch" else self.prices
        return -used.to(scores.dtype), solved.to(self.prices.dtype)

    @torch.no_grad()
    def update(self, requests_per_expert: Int[Tensor, "E"], proposal: Float[Tensor, "E"]) -> None:
        """Once an optimizer step, with the mean of its micro-batches' prices."""
        self.prices.copy_(proposal)
