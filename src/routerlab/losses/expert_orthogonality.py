"""The orthogonality loss: experts, or the router rows that stand for them, point apart."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from routerlab.core.checks import choice, within
from routerlab.core.routing import RoutingContext
from routerlab.ops.sharded import run_whole, whole


class ExpertOrthogonalityLoss:
    r"""The mean over pairs :math:`i \neq j` of :math:`G_{ij}^2` of one layer, from its weights
    alone: :math:`\lVert G - I \rVert_F^2 / (E (E - 1))`. 0 when all are orthogonal, 1 when all are
    parallel (in either sense).

    - ``of="router"``: :math:`G_{ij} = \cos(R_i, R_j)`, the rows of the router.
    - ``of="outputs"``: :math:`G_{ij}` is the mean over probe tokens x of
      :math:`\cos(y_i(x), y_j(x))`, the outputs of *all* experts on every probe.

    [reconstructed] from the similarity measures that are reported of experts; no paper's weight or
    probes are behind the defaults. The probes are normal draws scaled to a root mean square of 1,
    as a normalised layer input has, of ``context.step_generator``: one draw a step and layer, equal
    on all ranks. Their cost is that of ``num_probes`` tokens that go to every expert.

    Args:
        weight: of the loss.
        of: ``router`` or ``outputs``.
        num_probes: probe tokens of ``outputs``.

    Raises:
        ValueError: the layer lacks ``router.gate.weight`` [E, D] or ``experts.gate_up_proj``
            [E, 2F, D], whichever is asked for; or ``outputs`` without a context.
    """

    def __init__(self, weight: float = 0.01, of: str = "router", num_probes: int = 32) -> None:
        within("weight", weight, 0)
        choice("of", of, ("router", "outputs"))
        within("num_probes", num_probes, 1)
        self.weight, self.of, self.num_probes = weight, of, num_probes

    def of_layer(self, layer: Any, context: RoutingContext | None = None) -> Float[Tensor, ""]:
        """The loss of a layer."""
        if self.of == "router":
            rows = getattr(getattr(layer.router, "gate", None), "weight", None)
            if rows is None:
                raise ValueError(
                    "expert_orthogonality with of='router' needs router.gate.weight; "
                    f"{type(layer.router).__name__} has none"
                )
            with torch.autocast(rows.device.type, enabled=False):
                return mean_squared_cosine(whole(rows)[:, None])
        if context is None:
            raise ValueError(
                "expert_orthogonality with of='outputs' draws its probes from context.step_seed: "
                "pass a RoutingContext"
            )
        outputs = self._outputs(layer.experts, context)
        with torch.autocast(outputs.device.type, enabled=False):
            return mean_squared_cosine(outputs)

    def _outputs(self, experts: Any, context: RoutingContext) -> Float[Tensor, "E n D"]:
        weight = getattr(experts, "gate_up_proj", None)
        if weight is None:
            raise ValueError(
                "expert_orthogonality with of='outputs' needs experts.gate_up_proj; "
                f"{type(experts).__name__} has none"
            )
        num_experts, width = len(weight), weight.shape[-1]
        generator = context.step_generator(weight.device)
        probes = torch.randn(self.num_probes, width, generator=generator, device=weight.device)
        probes = probes / probes.square().mean(-1, keepdim=True).sqrt()
        rows = probes.to(weight.dtype).repeat(num_experts, 1)
        counts = torch.full((num_experts,), self.num_probes, device=weight.device)
        with torch.autocast(rows.device.type, enabled=False):
            outputs = run_whole(experts, rows, counts, rows.new_ones(len(rows)))
        return outputs.view(num_experts, self.num_probes, width)


def mean_squared_cosine(vectors: Float[Tensor, "E n D"]) -> Float[Tensor, ""]:
    """Mean over pairs i != j of the squared mean over n of cos(vectors[i, n], vectors[j, n])."""
    num_experts, num_probes, _ = vectors.shape
    units = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
    units = units.flatten(1)
    cosines = units @ units.T / num_probes
    others = cosines - torch.diag(cosines.diagonal())
    return others.square().sum() / max(num_experts * (num_experts - 1), 1)
