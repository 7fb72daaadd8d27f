"""BASE layers: every expert gets the same number of tokens, by linear assignment."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.core.checks import choice, within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.assignment import balanced_assignment
from routerlab.routers.gate import Gate, full_precision


class Base(nn.Module):
    r"""BASE (Lewis et al., arXiv 2103.16716): one expert a token, all experts equally loaded.

    Training: the assignment of valid tokens to experts that maximises the total affinity
    :math:`\sum_t x_t \cdot w_{e(t)}` among those where each expert has T/E tokens (floor or ceil
    where E does not divide T). Evaluation: each token's best expert, with whatever loads result.

    The weight is :math:`a_t = \sigma(x_t \cdot w_{e(t)})`, with gradient. The paper's output
    :math:`a_t N(x_t) + (1 - a_t)\,x_t`, with a stack of residual sublayers
    :math:`N(x) = x + f(x)`, is :math:`x_t + a_t f(x_t)`: what a residual connection around this
    layer gives, with :math:`f` as its experts.

    The paper assigns with an auction that may end early on a near-optimum; this is exact
    (`ops.assignment`, on the CPU: a GPU waits for it). Its shuffle of tokens between workers is
    left out: the routing group is the micro-batch of one rank. ``router_probs`` is
    :math:`\sigma(z)` over its sum.

    Args:
        d_model: D.
        num_experts: E.
        top_k: 1.
        init_gain: gain of the orthogonal initial weights.
    """

    causal = True
    causal_training = False

    def __init__(
        self, d_model: int, num_experts: int, top_k: int = 1, init_gain: float = 0.1
    ) -> None:
        super().__init__()
        choice("top_k", top_k, (1,))
        within("init_gain", init_gain, 0)
        self.num_experts, self.top_k = num_experts, top_k
        self.gate = Gate(d_model, num_experts)
        nn.init.orthogonal_(self.gate.weight, gain=init_gain)

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of one pick a token; padding is not assigned."""
        valid = None if context is None else context.valid
        logits = self.gate(x)
        with full_precision(x):
            experts = logits.detach().argmax(-1)
            if self.training and valid is None:
                experts = balanced_assignment(logits)
            elif self.training:
                experts[valid] = balanced_assignment(logits[valid])
            experts = experts[:, None]
            probs = F.logsigmoid(logits).softmax(-1)
            weights = logits.gather(-1, experts).sigmoid()
        return RouterOutput.from_top_k(logits, probs, experts, weights, valid=valid)
