"""Who is like whom: kernels on embeddings, neighbours, and weighted means over neighbours."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from routerlab.core.checks import choice, within

KINDS = ("knn", "ball", "random")
KERNELS = ("gaussian", "cosine_sq")
BLOCK = 256  # rows of a table of weights that are in memory at once


@dataclass(frozen=True)
class Neighbourhood:
    r"""Which candidates are a sample's neighbours, and how much each counts (RoMA, arXiv
    2511.07419, equations 3-6). Weights are similarities, normalised to sum to 1.

    Args:
        kind: ``knn``, the ``k`` most similar; ``ball``, all whose similarity is at least
            ``epsilon``; ``random``, ``k`` of them by lot with equal weights [reconstructed], which
            is the paper's control.
        k: neighbours at most; the paper's best is 3, its code has 5.
        epsilon: of the ball.
        sigma: width of the kernel.
        kernel: ``gaussian``, :math:`\exp(-\lVert a-b \rVert^2 / 2\sigma^2)`, the paper's; or
            ``cosine_sq``, :math:`\exp(-(1-\cos(a,b))^2 / 2\sigma^2)`, that of its code.
    """

    kind: str = "knn"
    k: int = 3
    epsilon: int | float = 0.5
    sigma: int | float = 0.4
    kernel: str = "gaussian"

    def __post_init__(self) -> None:
        choice("neighbours", self.kind, KINDS)
        choice("kernel", self.kernel, KERNELS)
        within("k", self.k, 1)
        within("epsilon", self.epsilon, 0, 1, above=True)
        within("sigma", self.sigma, 0, above=True)

    def weights(
        self,
        queries: Float[Tensor, "q m"],
        references: Float[Tensor, "n m"],
        allowed: Bool[Tensor, "n"] | Bool[Tensor, "q n"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "q n"]:
        """What each reference counts for each query: rows sum to 1, or to 0 where no neighbour is
        among the ``allowed`` ones. ``generator`` draws random neighbours.
        """
        logs = self.log_similarity(queries, references)
        if self.kind == "random":
            ranked = torch.rand(logs.shape, generator=generator).to(logs)
            logs = torch.zeros_like(logs)
        else:
            ranked = logs
        near = allowed.expand_as(logs)
        if self.kind == "ball":
            near = near & (logs >= math.log(self.epsilon))
        else:
            ranked = ranked.masked_fill(~near, -torch.inf)
            best = ranked.topk(min(self.k, ranked.shape[1]), dim=1).indices
            near = near & torch.zeros_like(near).scatter(1, best, True)
        # Relative to the nearest: similarities of far neighbours may all underflow.
        weights = logs.masked_fill(~near, -torch.inf).softmax(1)
        return torch.where(near, weights, 0.0)  # a row without neighbours is nan before

    def log_similarity(
        self, a: Float[Tensor, "p m"], b: Float[Tensor, "q m"]
    ) -> Float[Tensor, "p q"]:
        """Logarithms of the kernel's values."""
        if self.kernel == "cosine_sq":
            a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
            distance = (1 - a @ b.T).square()
        else:
            squares = a.square().sum(1)[:, None] + b.square().sum(1)
            distance = (squares - 2 * a @ b.T).clamp(min=0)
        return -distance / (2 * self.sigma**2)

    def blocks(
        self,
        embeddings: Float[Tensor, "n m"],
        candidates: Bool[Tensor, "n"],
        generator: torch.Generator | None = None,
    ) -> Iterator[Float[Tensor, "b n"]]:
        """The weights of ``candidates`` for each sample, a few rows at a time. A sample is no
        neighbour of its own.
        """
        numbers = torch.arange(len(embeddings), device=embeddings.device)
        for own in numbers.split(BLOCK):
            allowed = candidates & (own[:, None] != numbers)
            yield self.weights(embeddings[own], embeddings, allowed, generator)

    def means(
        self,
        embeddings: Float[Tensor, "n m"],
        candidates: Bool[Tensor, "n"],
        values: Float[Tensor, "n R"],
        generator: torch.Generator | None = None,
    ) -> "NeighbourMeans":
        """What the neighbours of each sample are on the mean."""
        exact = values.double()
        squares = exact.square().sum(1, keepdim=True)
        found = []
        for weights in self.blocks(embeddings, candidates, generator):
            sums = torch.sparse.mm(weights.double().to_sparse(), torch.cat([exact, squares], dim=1))
            mean, square = sums[:, :-1], sums[:, -1]
            spread = (square - mean.square().sum(1)).clamp(min=0)
            found.append((mean.to(values), spread.to(values), (weights > 0).sum(1)))
        return NeighbourMeans(*map(torch.cat, zip(*found, strict=True)))


@dataclass(frozen=True, eq=False)
class NeighbourMeans:
    r"""For each of n samples: the weighted mean :math:`\bar r_i = \sum_j W_{ij} r_j` of its
    neighbours' vectors, their spread :math:`\sum_j W_{ij} \lVert r_j - \bar r_i \rVert^2` around
    it, and their number (where it is 0, so are the others).
    """

    mean: Float[Tensor, "n R"]
    spread: Float[Tensor, "n"]
    count: Int[Tensor, "n"]

    def distances(
        self, vectors: Float[Tensor, "B R"], samples: Int[Tensor, "B"]
    ) -> Float[Tensor, "B"]:
        r""":math:`\sum_j W_{ij} \lVert r_i - r_j \rVert^2` of the vectors of these samples, which
        is :math:`\lVert r_i - \bar r_i \rVert^2` plus the spread; 0 for a sample without
        neighbours, and for the number -1.
        """
        known = samples.clamp(min=0)
        distances = (vectors - self.mean[known]).square().sum(1) + self.spread[known]
        return torch.where((samples >= 0) & (self.count[known] > 0), distances, 0.0)

    def to(self, device: torch.device) -> "NeighbourMeans":
        """The same on a device."""
        return NeighbourMeans(self.mean.to(device), self.spread.to(device), self.count.to(device))
