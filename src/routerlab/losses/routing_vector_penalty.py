"""Penalties on routing vectors that know no neighbours: baselines of manifold alignment."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from routerlab.core.checks import choice, within
from routerlab.core.layers import pick_layers
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.ops.entropy import entropy
from routerlab.ops.routing_vectors import TOKENS, routing_vectors, used_vectors

NORMS = ("l1", "l2", "entropy")


class RoutingVectorPenalty:
    r"""The mean over samples of a norm of the routing vector: the L1, L2 and entropy regularisers
    in the ablation of RoMA (arXiv 2511.07419), which gives no formula for them [reconstructed].

    A full softmax has the L1 norm 1, so ``l1`` :math:`\sum_e u_e` and ``l2`` :math:`\sum_e u_e^2`
    are of u, the probabilities of the experts that are used, not renormalised, summed over layers;
    ``entropy`` :math:`-\sum_e p_e \ln p_e` is of the full distribution, and a mean over layers.

    Args:
        weight: of the loss; a negative one rewards what a positive one punishes.
        norm: ``l1``, ``l2`` or ``entropy``.
        layers, token: as in `losses.manifold_alignment`.
    """

    def __init__(
        self,
        weight: int | float = 0.01,
        norm: str = "l2",
        layers: int | Sequence[int] | None = 5,
        token: str = "last1",
    ) -> None:
        within("weight", weight)
        choice("norm", norm, NORMS)
        choice("token", token, TOKENS)
        self.weight, self.norm, self.layers, self.token = weight, norm, layers, token

    def of_records(
        self,
        records: Mapping[str, RouterOutput],
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """The share of a micro-batch."""
        if context is None:
            raise ValueError("routing_vector_penalty: needs the context of the sequences")
        names = pick_layers(list(records), self.layers, "layers")
        where = (records, names, context, self.token)
        if self.norm == "l1":
            values = used_vectors(*where).sum()
        elif self.norm == "l2":
            values = used_vectors(*where).square().sum()
        else:
            sizes = [records[name].num_experts for name in names]
            blocks = routing_vectors(*where).split(sizes, dim=1)
            values = torch.stack([entropy(block).sum() for block in blocks]).mean()
        num_sequences = context.batch_size if totals is None else totals.num_sequences
        return values / num_sequences
