"""LoRA-Mixer's routing: all experts in training, the best few in evaluation."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.gate import Gate, full_precision


class SoftThenTopK(nn.Module):
    r"""A dense mixture while it learns, a sparse one when it is used (Li et al., LoRA-Mixer, arXiv
    2507.00029).

    With :math:`p = \mathrm{softmax}(x W^T)`, one bias-free linear map [reconstructed]: in training
    every expert works with weight :math:`p_i`, differentiable in all logits; in evaluation the
    ``eval_top_k`` most probable ones do, with :math:`p_i` over their sum [reconstructed].

    What is trained and what is used differ; ``eval_top_k=None`` evaluates the dense mixture, so
    that both can be compared.

    Args:
        d_model: D, width of the tokens.
        num_experts: E.
        eval_top_k: K of evaluation; null: all experts there too.
        normalize_weights: of evaluation: divide the K weights by their sum [reconstructed].
        init_std: standard deviation of the gate's initial weights.
    """

    causal = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        eval_top_k: int | None = 3,
        normalize_weights: bool = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if eval_top_k is not None:
            within("eval_top_k", eval_top_k, 1, num_experts)
        self.num_experts, self.eval_top_k = num_experts, eval_top_k
        self.normalize_weights = normalize_weights
        self.present = tuple(range(num_experts))
        self.gate = Gate(d_model, num_experts, init_std)

    @property
    def top_k(self) -> int:
        """Experts a token has in evaluation."""
        present = len(self.present)
        return present if self.eval_top_k is None else min(int(self.eval_top_k), present)

    def exclude(self, experts: Sequence[int]) -> None:
        """From now on these experts, and no others, have probability 0 [reconstructed]: those that
        have no weights where this router works. They keep their rows of the gate and their
        ``router_logits``. It is no part of the state that is saved.

        Raises:
            ValueError: a number out of range, or no expert is left.
        """
        for expert in experts:
            within("exclude: expert", expert, 0, self.num_experts - 1)
        present = tuple(e for e in range(self.num_experts) if e not in experts)
        if not present:
            raise ValueError(
                f"exclude: experts={list(experts)}: must leave at least one of {self.num_experts}"
            )
        self.present = present

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of all experts that are present (training), or of ``top_k`` of them."""
        valid = None if context is None else context.valid
        soft = self.training or self.eval_top_k is None
        with full_precision(x):
            logits = self.gate(x)
            scores = self._of_present(logits)
            probs = scores.softmax(-1)
            if soft:
                experts = torch.tensor(self.present, device=x.device).expand(len(x), -1)
            else:
                experts = scores.topk(self.top_k, dim=-1).indices
            weights = probs.gather(-1, experts)
            if self.normalize_weights and not soft:
                weights = scores.gather(-1, experts).softmax(-1)
        return RouterOutput.from_top_k(logits, probs, experts, weights, valid=valid)

    def _of_present(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """The logits, minus infinity where an expert is absent."""
        absent = [e for e in range(self.num_experts) if e not in self.present]
        if not absent:
            return logits
        return logits.index_fill(1, torch.tensor(absent, device=logits.device), -torch.inf)
