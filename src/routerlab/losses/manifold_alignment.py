"""Manifold alignment: questions alike are routed alike."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from routerlab.core.checks import choice, within
from routerlab.core.layers import pick_layers
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.core.seeding import stable_seed
from routerlab.ops.neighbours import Neighbourhood, NeighbourMeans
from routerlab.ops.routing_vectors import TOKENS, routing_vectors


@runtime_checkable
class Bank(Protocol):
    """What the loss must know of the training samples (`analysis.neighbour_bank`): sample i has
    number i.
    """

    @property
    def embeddings(self) -> Float[Tensor, "n m"]: ...

    @property
    def routing(self) -> Float[Tensor, "n R"]: ...

    @property
    def correct(self) -> Bool[Tensor, "n"]: ...

    @property
    def layers(self) -> Mapping[str, int]: ...

    @property
    def token(self) -> str: ...


class ManifoldAlignment:
    r""":math:`\frac{1}{B} \sum_i \sum_{j \in N(i)} W_{ij} \lVert r_i - r_j \rVert_2^2`, summed over
    layers (RoMA, Li et al., arXiv 2511.07419, equations 3-9): the routing vector of each sample is
    drawn towards those of similar samples that the model answered rightly before it was tuned.

    :math:`r_i` is live: its gradient reaches the routers. The neighbours' vectors and weights come
    from a bank (`use_bank`) and are constants. Samples without neighbours count 0, and so do those
    with the number -1, which are not in the bank.

    Args:
        weight: :math:`\lambda`; 0.8 in the paper's code, after a warm-up, which
            `objectives.routing_alignment` applies.
        layers: how many of the last routed layers, a list of layer numbers, or None: all.
        token: which prompt tokens' routing is aligned (`ops.routing_vectors.token_positions`).
        neighbours, k, epsilon, sigma, kernel: see `ops.neighbours.Neighbourhood`.
    """

    def __init__(
        self,
        weight: int | float = 0.8,
        layers: int | Sequence[int] | None = 5,
        token: str = "last1",
        neighbours: str = "knn",
        k: int = 3,
        epsilon: int | float = 0.5,
        sigma: int | float = 0.4,
        kernel: str = "gaussian",
    ) -> None:
        within("weight", weight, 0)
        choice("token", token, TOKENS)
        self.weight, self.layers, self.token = weight, layers, token
        self.neighbourhood = Neighbourhood(neighbours, k, epsilon, sigma, kernel)
        self._means: NeighbourMeans | None = None
        self._bank_layers: list[str] = []

    def use_bank(self, bank: Bank, seed: int = 0) -> None:
        """Takes the neighbours of every sample from a bank; ``seed`` draws random ones. Warns if
        the bank holds no sample that was answered rightly: this loss is then 0.

        Raises ValueError if the bank's routing vectors are of another token.
        """
        if bank.token != self.token:
            raise ValueError(f"token={self.token!r}: the bank holds {bank.token!r}")
        if not bank.correct.any():
            warnings.warn(
                f"manifold_alignment: the model answers none of the {len(bank.correct)} samples "
                "rightly, so there are no neighbours; only the task is learned",
                stacklevel=2,
            )
        draws = torch.Generator().manual_seed(stable_seed("neighbours", seed))
        self._means = self.neighbourhood.means(bank.embeddings, bank.correct, bank.routing, draws)
        self._bank_layers = list(bank.layers)

    def of_records(
        self,
        records: Mapping[str, RouterOutput],
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """The share of a micro-batch.

        Raises ValueError without the samples' numbers (``context.sample_ids``), without a bank that
        has them, and where routers sample their choice.
        """
        if context is None or context.sample_ids is None:
            raise ValueError(
                "manifold_alignment: needs the numbers of the samples (batch['sample']); it goes "
                "with objective=routing_alignment and data of tasks"
            )
        if context.num_replicas > 1 or context.replica:
            raise ValueError("manifold_alignment: does not go with routers that sample a choice")
        names = pick_layers(list(records), self.layers, "layers")
        vectors = routing_vectors(records, names, context, self.token)
        means = self._of_bank(names, context.sample_ids, vectors.device)
        if means is None:
            return vectors.new_zeros(())
        num_sequences = context.batch_size if totals is None else totals.num_sequences
        return means.distances(vectors, context.sample_ids).sum() / num_sequences

    def _of_bank(
        self, names: list[str], samples: Tensor, device: torch.device
    ) -> NeighbourMeans | None:
        """The bank's means on the device; None before there is a bank, where no sample needs it."""
        if self._means is None:
            if (samples >= 0).any():
                raise ValueError("manifold_alignment: has no bank of neighbours; call use_bank")
            return None
        if self._bank_layers != names:
            raise ValueError(
                f"layers={self.layers}: are {', '.join(names)}; the bank holds "
                f"{', '.join(self._bank_layers)}"
            )
        if self._means.mean.device != device:
            self._means = self._means.to(device)
        return self._means
