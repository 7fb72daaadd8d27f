"""The expert-router coupling loss: every expert answers most to its own router row."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from routerlab.core.checks import within
from routerlab.core.routing import RoutingContext
from routerlab.ops.sharded import whole

_MAX_RADIUS = 0.999  # a radius of 1 or more could turn a coordinate's sign
_MAX_ACTIVATIONS = 2**25  # kept for the backward pass; beyond it they are computed again


class ExpertRouterCouplingLoss:
    r"""ERC of one layer, from its weights alone (Lv et al., arXiv 2512.23447).

    Router row :math:`R_i` stands for the tokens of expert i. With
    :math:`\tilde R_i = R_i \odot \delta_i`, :math:`\delta_i \sim U(1 - \epsilon_i, 1 + \epsilon_i)`
    for each coordinate and :math:`M_{ij} = \lVert \tilde R_i W_g^j \rVert_2` over the gate half of
    expert j's SwiGLU,

    .. math:: \frac{1}{E^2} \sum_i \sum_{j \neq i} \max(M_{ij} - \alpha M_{ii}, 0)
              + \max(M_{ji} - \alpha M_{ii}, 0).

    The first term wants token i to excite expert i most, the second wants expert i to be excited
    by token i most. The gradient reaches the router rows and the gate halves, nothing else. The
    loss shrinks with the norms of both, so it is no loss to train on alone. It is computed in
    float32 (float64 for such weights) and costs :math:`2 E^2 D F` operations forward, however many
    tokens there are. It reads no token and has no cost in evaluation.

    [reconstructed] :math:`\epsilon` is detached (the nearest distance is not smooth), and it is
    kept below 1, where a small row with far neighbours would exceed it.

    Args:
        weight: of the loss (that of the paper is not known).
        alpha: how much another activation may reach of the own one. 1: only the order counts (best
            at 3B with 64 experts); lower asks for more specialisation (0.5 best at 15B with 256).
        noise: perturb the rows; without, the coupling overfits the rows themselves. The noise is
            that of ``context.step_generator``: one draw a step and layer, equal on all ranks.

    Raises:
        ValueError: the layer lacks ``router.gate.weight`` [E, D] or ``experts.gate_up_proj``
            [E, 2F, D] (gate rows first), or ``noise`` is on and there is no context.
    """

    def __init__(self, weight: float = 1.0, alpha: float = 1.0, noise: bool = True) -> None:
        within("weight", weight, 0)
        within("alpha", alpha, 0)
        self.weight, self.alpha, self.noise = weight, alpha, noise

    def of_layer(self, layer: Any, context: RoutingContext | None = None) -> Float[Tensor, ""]:
        """The loss of a layer."""
        rows, gates = layer_weights(layer)
        with torch.autocast(rows.device.type, enabled=False):
            if self.noise:
                if context is None:
                    raise ValueError(
                        "expert_router_coupling with noise=true draws from context.step_seed: "
                        "pass a RoutingContext"
                    )
                rows = perturbed(rows, context.step_generator(rows.device))
            return coupling_loss(coupling_matrix(rows, gates), self.alpha)

    @torch.no_grad()
    def probe(self, layer: Any) -> dict[str, Tensor]:
        r"""How specialised a layer is, by its rows as they are (no noise, no gradient).

        ``radius_mean`` and ``radius_min``: of `perturbation_radius`, which grows as rows part.
        ``expert_violations``: share of pairs where token i excites expert j more than ``alpha``
        times expert i (first term); ``router_violations``: where expert i is excited by token j
        more than ``alpha`` times by token i (second term).
        ``ratio``: mean over i of :math:`\max_{j \neq i} M_{ij} / M_{ii}`; below 1 is coupled.
        """
        rows, gates = layer_weights(layer)
        if len(rows) < 2:
            raise ValueError("expert_router_coupling.probe needs at least 2 experts")
        with torch.autocast(rows.device.type, enabled=False):
            matrix = coupling_matrix(rows, gates)
        radius, own = perturbation_radius(rows), matrix.diagonal()
        pairs = len(matrix) * (len(matrix) - 1)
        expert_excess, router_excess = excess(matrix, self.alpha)
        others = matrix - torch.diag(own)
        return {
            "radius_mean": radius.mean(),
            "radius_min": radius.min(),
            "expert_violations": (expert_excess > 0).sum() / pairs,
            "router_violations": (router_excess > 0).sum() / pairs,
            "ratio": (others.amax(1) / own.clamp(min=torch.finfo(own.dtype).tiny)).mean(),
        }


def layer_weights(layer: Any) -> tuple[Float[Tensor, "E D"], Float[Tensor, "E F D"]]:
    """Router rows and gate halves of a layer, in float32 or more."""
    rows = whole(_weight(layer, "router.gate.weight", 2))
    gate_up = whole(_weight(layer, "experts.gate_up_proj", 3))
    if rows.shape != (len(gate_up), gate_up.shape[2]):
        raise ValueError(
            f"expert_router_coupling: router.gate.weight {tuple(rows.shape)} does not fit "
            f"experts.gate_up_proj {tuple(gate_up.shape)}: each expert needs one row of its width"
        )
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(dtype), gate_up[:, : gate_up.shape[1] // 2].to(dtype)


def _weight(layer: Any, path: str, ndim: int) -> Tensor:
    found = layer
    for name in path.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, Tensor) or found.ndim != ndim:
        raise ValueError(
            f"expert_router_coupling needs a layer with {path} of {ndim} dimensions; this layer's "
            f"{path.split('.')[0]} ({type(getattr(layer, path.split('.')[0], None)).__name__}) "
            f"has {'none' if not isinstance(found, Tensor) else tuple(found.shape)}"
        )
    return found


@torch.no_grad()
def perturbation_radius(rows: Float[Tensor, "E D"]) -> Float[Tensor, "E"]:
    r""":math:`\epsilon_i = \min_{j \neq i} \lVert R_i - R_j \rVert / (2 \lVert R_i \rVert)`: half
    the distance to the nearest row, relative to the own norm. Not bounded; 0 for equal rows.
    """
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    return distances.amin(1) / (2 * rows.norm(dim=1)).clamp(min=1e-12)


def perturbed(rows: Float[Tensor, "E D"], generator: torch.Generator) -> Float[Tensor, "E D"]:
    """Rows times fresh noise that leaves each nearer to its own place than to any other row."""
    radius = perturbation_radius(rows).clamp(max=_MAX_RADIUS)
    noise = torch.rand(rows.shape, generator=generator, device=rows.device, dtype=rows.dtype)
    return rows * (1 + radius[:, None] * (2 * noise - 1))


def coupling_matrix(
    rows: Float[Tensor, "E D"], gates: Float[Tensor, "E F D"]
) -> Float[Tensor, "E E"]:
    """Norms of ``gates[j] @ rows[i]`` at [i, j]: row = router row, column = expert."""
    num_experts, d_ff, _ = gates.shape
    size = max(1, _MAX_ACTIVATIONS // (num_experts * d_ff))
    if size >= num_experts:
        return _activation_norms(rows, gates)
    parts = [
        checkpoint(_activation_norms, rows, part, use_reentrant=False) for part in gates.split(size)
    ]
    return torch.cat(parts, dim=1)


def _activation_norms(rows: Tensor, gates: Tensor) -> Tensor:
    activations = torch.bmm(rows.expand(len(gates), -1, -1), gates.mT)  # [experts, rows, F]
    return torch.linalg.vector_norm(activations, dim=-1).T


def excess(
    matrix: Float[Tensor, "E E"], alpha: float
) -> tuple[Float[Tensor, "E E"], Float[Tensor, "E E"]]:
    """Both terms of the loss, 0 on the diagonal: at [i, j] what M_ij exceeds of M_ii (expert
    specialisation), and of M_jj (router accuracy).
    """
    own = alpha * matrix.diagonal()
    others = ~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
    return (matrix - own[:, None]).relu() * others, (matrix - own[None, :]).relu() * others


def coupling_loss(matrix: Float[Tensor, "E E"], alpha: float) -> Float[Tensor, ""]:
    """The loss of an activation matrix; the divisor is E^2 and not E (E - 1)."""
    expert_excess, router_excess = excess(matrix, alpha)
    return (expert_excess + router_excess).sum() / matrix.numel()
