"""DynMoLE: all experts for tokens of which the router is unsure, a small set for the others."""

import math

from jaxtyping import Bool, Float
from torch import Tensor, nn

from routerlab.core.checks import choice, within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.entropy import renyi_entropy, tsallis_entropy
from routerlab.ops.selection import nucleus, softmax_over
from routerlab.routers.gate import Gate, full_precision

_ENTROPIES = {"tsallis": tsallis_entropy, "renyi": renyi_entropy}


class EntropyGated(nn.Module):
    r"""DynMoLE's hybrid rule (Li et al., arXiv 2504.00661, and its reference code).

    With :math:`p = \mathrm{softmax}(x W^T)` and the normalised entropy

    .. math:: H(p) = \frac{1 - \sum_i (p_i + \epsilon)^q}{1 - E^{1-q}}

    (Tsallis; about 1 when uniform, 0 when certain), a token with H(p) above ``entropy_threshold``
    uses all E experts. Any other token uses the most probable ones as long as their sum stays
    within ``top_p``, and its ``keep_top_k`` best in any case: the expert that crosses ``top_p`` is
    not used. Weights are :math:`p_i`, *not* renormalised: they sum to 1 or less, which suits LoRA
    experts beside a frozen path and shrinks any others.

    The set is a constant for the gradient; the weights carry it to all logits. Training and
    evaluation are alike. A fresh router is unsure of everything, so early training costs E experts
    a token, whatever ``keep_top_k`` is.

    Args:
        d_model: D, width of the tokens.
        num_experts: E.
        entropy_threshold: of H, at least 0; from 1 on the entropy is not looked at, and every token
            has a small set.
        entropic_index: q, above 0; within 0.01 of 1 it is taken as 1, Shannon's.
        entropy_type: ``tsallis`` or ``renyi``.
        entropy_eps: :math:`\epsilon`, added without renormalising: H(uniform) is just below 1.
        top_p: probability that a small set may gather, above 0 and at most 1.
        keep_top_k: fewest experts a token.
        normalize_weights: divide the weights by their sum.
        init_std: standard deviation of the gate's initial weights; null: Kaiming uniform, within
            :math:`\pm 1 / \sqrt{D}`, as the reference.
    """

    causal = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        entropy_threshold: float = 0.9,
        entropic_index: float = 1.1,
        entropy_type: str = "tsallis",
        entropy_eps: float = 1e-5,
        top_p: float = 0.75,
        keep_top_k: int = 2,
        normalize_weights: bool = False,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        within("entropy_threshold", entropy_threshold, 0)
        within("entropic_index", entropic_index, 0, above=True)
        choice("entropy_type", entropy_type, tuple(_ENTROPIES))
        within("entropy_eps", entropy_eps, 0)
        within("top_p", top_p, 0, 1, above=True)
        within("keep_top_k", keep_top_k, 1, num_experts)
        self.num_experts = num_experts
        self.entropy_threshold, self.entropic_index = entropy_threshold, entropic_index
        self.entropy_type, self.entropy_eps = entropy_type, entropy_eps
        self.top_p, self.keep_top_k = top_p, keep_top_k
        self.normalize_weights = normalize_weights
        self.gate = Gate(d_model, num_experts, 0.0 if init_std is None else init_std)
        if init_std is None:
            nn.init.kaiming_uniform_(self.gate.weight, a=math.sqrt(5))

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of ``keep_top_k`` to E picks a token."""
        valid = None if context is None else context.valid
        with full_precision(x):
            logits = self.gate(x)
            probs = logits.softmax(-1)
            mask = self._active(probs.detach())
            weights = softmax_over(logits, mask) if self.normalize_weights else probs
        return RouterOutput.from_dispatch_mask(logits, probs, mask, weights, valid=valid)

    def _active(self, probs: Float[Tensor, "T E"]) -> Bool[Tensor, "T E"]:
        small = nucleus(probs, self.top_p, self.keep_top_k, include_crossing=False)
        if self.entropy_threshold >= 1:
            return small
        entropy = _ENTROPIES[self.entropy_type](probs, self.entropic_index, self.entropy_eps)
        return small | (entropy > self.entropy_threshold)[:, None]
