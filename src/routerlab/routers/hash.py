"""Hash routing: a token's experts are a fixed function of its vocabulary id."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.core.seeding import stable_seed
from routerlab.routers.forced import forced_choice

_32_BITS = 0xFFFFFFFF


class HashRouter(nn.Module):
    """K distinct experts a vocabulary id, each with weight 1/K: the random hash of Roller et al.
    (Hash Layers, arXiv 2106.04426).

    An id ranks all experts by a hash of (seed, layer, expert, id) and takes the first K, so no
    table and no size of the vocabulary is needed, and every layer has another hash. It has no
    parameters and learns nothing. Experts are used as evenly as the ids are.

    Args:
        d_model: D; not used.
        num_experts: E.
        top_k: K; 1 in the paper.
        seed: of the hash.
    """

    causal = True

    def __init__(self, d_model: int, num_experts: int, top_k: int = 2, seed: int = 0) -> None:
        super().__init__()
        within("top_k", top_k, 1, num_experts)
        self.num_experts, self.top_k, self.seed = num_experts, top_k, seed

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of K picks a token, for the ids of ``context.token_ids``. ``router_probs`` are
        uniform over a token's K experts; logits are 0 and do not follow them.
        """
        if context is None or context.token_ids is None:
            raise ValueError(
                "hash routing reads context.token_ids: pass a RoutingContext with them"
            )
        layer, experts = context.layer, range(self.num_experts)
        salts = [stable_seed(self.seed, layer, expert) & _32_BITS for expert in experts]
        salt = torch.tensor(salts, device=x.device)
        rank = _mix((_mix(context.token_ids.long())[:, None] + salt) & _32_BITS)
        picks = rank.argsort(dim=-1, descending=True, stable=True)[:, : self.top_k]
        probs = x.new_zeros(len(x), self.num_experts, dtype=torch.float32)
        probs.scatter_(1, picks, 1 / self.top_k)
        return forced_choice(x, picks, probs, context)


def _mix(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """A 32-bit hash: each bit of a 32-bit number moves about half of all bits (the constants are
    those of Wellons' hash prospector). No product leaves 63 bits.
    """
    numbers = numbers ^ (numbers >> 16)
    numbers = (numbers * 0x21F0AAAD) & _32_BITS
    numbers = numbers ^ (numbers >> 15)
    numbers = (numbers * 0x735A2D97) & _32_BITS
    return numbers ^ (numbers >> 15)
