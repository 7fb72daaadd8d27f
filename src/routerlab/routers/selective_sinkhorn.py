"""Selective Sinkhorn routing: the balanced plan on a few training steps, a softmax on the rest."""

import torch
from torch import Tensor

from routerlab.core.checks import choice, within
from routerlab.core.routing import RoutingContext
from routerlab.routers.sinkhorn import Sinkhorn


class SelectiveSinkhorn(Sinkhorn):
    r"""SSR (Nguyen et al., arXiv 2511.08972): `Sinkhorn` with probability p, else top-k softmax.

    In training a coin of probability p decides, once an optimizer step and layer, between the plan
    and the renormalised top-k softmax; the same on all ranks, in all micro-batches and in
    recomputation. Evaluation is the softmax, without noise. ``p = 1`` is `Sinkhorn`, ``p = 0``
    softmax token choice. The paper uses no balance loss and no z-loss with it.

    Args:
        d_model, num_experts, top_k, cost, xi, max_iter, tol, ot_grad, init_std: as in `Sinkhorn`.
            Defaults of cost and xi follow a third-party implementation of the paper; xi of 0.5 and
            1 are reported too.
        p: the share of plan steps; 0.001 to 0.01 in the paper.
        granularity: whether each ``layer`` or the whole ``step`` throws the coin [reconstructed].
        noise_branch: what gets Gaussian noise in training [reconstructed: two reports of the paper
            disagree]: ``softmax`` (its logits), ``sinkhorn`` (C), ``both`` or ``none``.
        noise_std: its standard deviation; 0.1 to 4 in the paper.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        p: float = 0.001,
        granularity: str = "layer",
        cost: str = "softmax",
        xi: float = 0.05,
        max_iter: int = 100,
        tol: float = 1e-4,
        ot_grad: str = "envelope",
        noise_branch: str = "none",
        noise_std: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, cost, xi, max_iter, tol, ot_grad, init_std)
        within("p", p, 0, 1)
        choice("granularity", granularity, ("layer", "step"))
        choice("noise_branch", noise_branch, ("softmax", "sinkhorn", "both", "none"))
        within("noise_std", noise_std, 0)
        if noise_std and noise_branch == "none":
            raise ValueError(f"noise_std={noise_std}: without effect with noise_branch='none'")
        self.p, self.granularity = p, granularity
        self.noise_branch, self.noise_std = noise_branch, noise_std

    @property
    def causal_training(self) -> bool:
        """False where any training step may draw the plan."""
        return self.p == 0

    def _training_scores(self, logits: Tensor, context: RoutingContext | None) -> Tensor:
        if not self._draws_plan(context):
            return self._noisy(logits, "softmax", context)
        compatibility = self._noisy(self._compatibility(logits), "sinkhorn", context)
        return self._plan_scores(compatibility, context)

    def _draws_plan(self, context: RoutingContext | None) -> bool:
        if self.p in (0, 1):
            return self.p == 1
        if context is None:
            raise ValueError("0 < p < 1 draws from context.step_seed: pass a RoutingContext")
        if self.granularity == "step":
            context = context.at_layer(0)
        generator = context.step_generator(torch.device("cpu"))
        return torch.rand((), generator=generator).item() < self.p

    def _noisy(self, scores: Tensor, branch: str, context: RoutingContext | None) -> Tensor:
        if not self.noise_std or self.noise_branch not in (branch, "both"):
            return scores
        if context is None:
            raise ValueError("noise_std > 0 draws from context.seed: pass a RoutingContext")
        noise = torch.randn(
            scores.shape,
            generator=context.generator(scores.device),
            device=scores.device,
            dtype=scores.dtype,
        )
        return scores + self.noise_std * noise
