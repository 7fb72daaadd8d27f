"""DynaMoE: all experts above a percentile of the gate values, and rules that adapt the number."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from routerlab.core.checks import choice, within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.selection import (
    above_threshold,
    count_above_percentile,
    lower_percentile,
    nucleus,
    softmax_over,
)
from routerlab.routers.gate import Gate, full_precision

_MODES = ("percentile_token", "percentile_batch", "absolute", "cumulative")


class DynaMoE(nn.Module):
    r"""Experts whose gate value exceeds a threshold, at least the best one (Gülmez, arXiv
    2603.01697). Gate values are :math:`g = \mathrm{softmax}(x W^T / \theta)`, in training plus
    Gaussian noise. The threshold is, by ``mode``:

    - ``percentile_token``, as published: the percentile of the token's own E gate values. That
      gives every token the *same* number of experts,
      :math:`\max(1, E - 1 - \lfloor \tau (E - 1) \rfloor)`: top-k with flat weights.
      At 1 (E = 4 with the default percentile) the weight is always 1 and the router gets no
      gradient;
    - ``percentile_batch`` [reconstructed]: the percentile of all gate values of the micro-batch, so
      the number varies by token around :math:`(1 - \tau) E`. Training therefore looks at later
      tokens; evaluation uses a moving average of the thresholds. It starts at 1/E;
    - ``absolute`` [reconstructed]: ``factor / E``;
    - ``cumulative`` [reconstructed]: the fewest experts whose gate values sum to ``top_p``.

    The weights are a second softmax, of the chosen (noisy) gate *values*, nearly flat. With
    ``weight="renorm"`` they are the chosen values without noise over their sum. There is no balance
    loss and no capacity in the paper.

    Args:
        d_model: D, width of the tokens.
        num_experts: E.
        mode: the rule; only ``percentile_token`` has a ``top_k``.
        percentile: tau, strictly between 0 and 1; a higher one means fewer experts.
        factor: c of ``absolute``, above 0.
        top_p: of ``cumulative``, above 0 and at most 1.
        temperature: theta; that it is within the first softmax is [reconstructed].
        noise_std: of the noise on the gate values; 0.1 is large beside 1/E.
        weight: ``softmax`` or ``renorm``.
        ema_decay: of the moving average of ``percentile_batch``, once an optimizer step.
        init_std: standard deviation of the gate's initial weights.
    """

    causal = True
    threshold: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        mode: str = "percentile_token",
        percentile: float = 0.75,
        factor: float = 1.0,
        top_p: float = 0.5,
        temperature: float = 0.5,
        noise_std: float = 0.1,
        weight: str = "softmax",
        ema_decay: float = 0.99,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        choice("mode", mode, _MODES)
        within("percentile", percentile, 0, 1, above=True, below=True)
        within("factor", factor, 0, above=True)
        within("top_p", top_p, 0, 1, above=True)
        within("temperature", temperature, 0, above=True)
        within("noise_std", noise_std, 0)
        choice("weight", weight, ("softmax", "renorm"))
        within("ema_decay", ema_decay, 0, 1, below=True)
        self.num_experts, self.mode, self.percentile = num_experts, mode, percentile
        self.factor, self.top_p, self.temperature = factor, top_p, temperature
        self.noise_std, self.weight, self.ema_decay = noise_std, weight, ema_decay
        self.gate = Gate(d_model, num_experts, init_std)
        self.causal_training = mode != "percentile_batch"
        if mode == "percentile_token":
            self.top_k = count_above_percentile(num_experts, percentile)
        if mode == "percentile_batch":
            self.register_buffer("threshold", torch.full((1,), 1 / num_experts))

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of any number of picks a token, at least one."""
        valid = None if context is None else context.valid
        with full_precision(x):
            logits = self.gate(x)
            scaled = logits / self.temperature
            probs = scaled.softmax(-1)
            gates = self._noisy(probs, context)
            proposal = None
            if self.mode == "cumulative":
                mask = nucleus(gates.detach(), self.top_p)
            elif self.mode == "percentile_token":
                # without noise logits rank alike, and do not tie where the softmax underflows
                values = (scaled if gates is probs else gates).detach()
                mask = above_threshold(values, lower_percentile(values, self.percentile)[:, None])
            else:
                values = gates.detach()
                threshold, proposal = self._shared_threshold(values, valid)
                mask = above_threshold(values, threshold)
            weights = softmax_over(gates if self.weight == "softmax" else scaled, mask)
        return RouterOutput.from_dispatch_mask(
            logits, probs, mask, weights, valid=valid, proposal=proposal
        )

    @torch.no_grad()
    def update(self, requests_per_expert: Int[Tensor, "E"], proposal: Float[Tensor, "P"]) -> None:
        """Moves the average of the thresholds towards the step's mean."""
        if self.mode == "percentile_batch":
            self.threshold.lerp_(proposal.to(self.threshold), 1 - self.ema_decay)

    def _shared_threshold(
        self, values: Tensor, valid: Tensor | None
    ) -> tuple[float | Tensor, Tensor | None]:
        """One threshold for all tokens, and what it proposes for the moving average."""
        if self.mode == "absolute":
            return self.factor / self.num_experts, None
        if not self.training:
            return self.threshold, None
        real = (values if valid is None else values[valid]).flatten()
        if not len(real):
            return self.threshold, self.threshold.clone()
        proposal = lower_percentile(real, self.percentile)[None]
        return proposal, proposal

    def _noisy(self, probs: Tensor, context: RoutingContext | None) -> Tensor:
        if not (self.training and self.noise_std):
            return probs
        if context is None:
            raise ValueError("noise_std > 0 draws from context.seed: pass a RoutingContext")
        generator = context.generator(probs.device)
        noise = torch.randn(
            probs.shape, generator=generator, dtype=probs.dtype, device=probs.device
        )
        return probs + self.noise_std * noise
