"""The best assignment of tokens to experts among those with even loads."""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from routerlab.ops.sinkhorn import sinkhorn_bias

UNITS = 2.0**48  # scores become integers: this many units between the smallest and the largest
FAR = 1 << 60  # the length of a missing edge; a path of E edges is below 2 * E * UNITS


def balanced_assignment(scores: Float[Tensor, "T E"]) -> Int[Tensor, "T"]:
    r"""One expert a token: the assignment of the largest total score in which every expert has
    ``floor(T/E)`` or ``ceil(T/E)`` tokens (exactly T/E where E divides T).

    Exact: scores are rounded to 2^-48 of their range and the rest is integer arithmetic, so the
    total is at most T 2^-48 of that range below the optimum, whatever the scores.

    Prices that nearly balance the loads come from a few Sinkhorn iterations. To send every token to
    its best expert at *any* prices is optimal for the loads that result. Shortest augmenting paths
    over the E experts then move the surplus to where there is room, and keep that optimality
    (Ahuja, Magnanti and Orlin, Network Flows, section 9.7). Runs on the CPU.

    Args:
        scores: higher is better; non-finite ones count as the smallest finite one, as in fairseq.
    """
    exact = _in_units_of_their_range(scores.detach().double().cpu())
    if exact.numel() == 0:
        return torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    gains = (exact * UNITS).round().long().numpy()
    flow = _Flow(gains, (_prices(exact) * UNITS).round().long().numpy())
    while (flow.excess > 0).any():
        flow.push(flow.shortest_path())
    return torch.from_numpy(flow.owner).to(scores.device)


def _in_units_of_their_range(scores: Tensor) -> Tensor:
    """From 0 to 1."""
    finite = scores[scores.isfinite()]
    if not len(finite):
        return torch.zeros_like(scores)
    low, high = finite.min(), finite.max()
    scores = torch.where(scores.isfinite(), scores, low)
    return scores / (high - low) - low / (high - low) if high > low else torch.zeros_like(scores)


def _prices(scores: Tensor) -> Tensor:
    """Expert prices at which loads are nearly even: Sinkhorn on ever colder scores."""
    prices = scores.new_zeros(scores.shape[1])
    spread = scores.std(correction=0).clamp(min=1e-6)
    for temperature in (0.3 * spread, 0.1 * spread, 0.03 * spread):
        choices = ((scores - prices) / temperature).float().log_softmax(-1)
        prices = prices - temperature * sinkhorn_bias(choices, max_iter=10, tol=0.0)
    return prices


class _Flow:
    """An assignment that is optimal for its loads, and the cost of every change to it.

    Expert e has ``floor(T/E)`` slots, one more if ``extra[e]``; ``excess`` is its tokens less its
    slots. ``cost[a, b]`` is the least loss of score for moving a token from expert a to b. Node E
    hands out the ``T mod E`` extra slots: ``cost[a, E]`` = 0 gives a one, ``cost[E, b]`` = 0 takes
    it from b. No cycle has a negative cost: that is the optimality.
    """

    def __init__(self, gains: np.ndarray, prices: np.ndarray) -> None:
        num_tokens, self.num_experts = gains.shape
        self.gains = gains
        self.owner = (gains - prices).argmax(1)
        floor, num_extra = divmod(num_tokens, self.num_experts)
        self.extra = np.zeros(self.num_experts, dtype=bool)
        self.extra[np.argsort(-prices, kind="stable")[:num_extra]] = True
        self.excess = np.bincount(self.owner, minlength=self.num_experts) - floor - self.extra
        self.cost = np.full((self.num_experts + 1, self.num_experts + 1), FAR)
        self._refresh(range(self.num_experts))

    def shortest_path(self) -> list[int]:
        """The cheapest way from an expert with too many tokens to one with too few (Bellman)."""
        distance = np.where(np.append(self.excess, 0) > 0, 0, FAR)
        parent = np.full(self.num_experts + 1, -1)
        changed = np.flatnonzero(distance == 0)
        while len(changed):
            through = distance[changed, None] + self.cost[changed]
            best = through.min(0)
            better = best < distance
            parent[better] = changed[through.argmin(0)[better]]
            distance[better] = best[better]
            changed = np.flatnonzero(better)
        path = [int(np.where(self.excess < 0, distance[:-1], FAR).argmin())]
        while parent[path[-1]] >= 0:
            path.append(int(parent[path[-1]]))
        return path[::-1]

    def push(self, path: list[int]) -> None:
        """Moves as many tokens along the path as are equally cheap."""
        edges = list(zip(path, path[1:], strict=False))
        movers = [self._cheapest(a, b) for a, b in edges]
        amount = min(self.excess[path[0]], -self.excess[path[-1]], *map(len, movers))
        for (a, b), tokens in zip(edges, movers, strict=True):
            if b == self.num_experts:
                self.extra[a] = True
            elif a == self.num_experts:
                self.extra[b] = False
            else:
                self.owner[tokens[:amount]] = b
        self.excess[path[0]] -= amount
        self.excess[path[-1]] += amount
        self._refresh(expert for expert in path if expert != self.num_experts)

    def _cheapest(self, a: int, b: int) -> np.ndarray:
        """The tokens (for node E: one slot) that move from a to b at the least cost."""
        if self.num_experts in (a, b):
            return np.zeros(1, dtype=int)
        tokens = np.flatnonzero(self.owner == a)
        return tokens[self.gains[tokens, a] - self.gains[tokens, b] == self.cost[a, b]]

    def _refresh(self, experts: Iterable[int]) -> None:
        pool = self.num_experts
        for a in experts:
            own = self.gains[self.owner == a]
            if len(own):
                self.cost[a, :pool] = (own[:, a, None] - own).min(0)
            else:
                self.cost[a, :pool] = FAR
            self.cost[a, a] = FAR
            self.cost[a, pool] = FAR if self.extra[a] else 0
            self.cost[pool, a] = 0 if self.extra[a] else FAR
