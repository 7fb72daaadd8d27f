"""DeepSeekMoE's device-level balance loss: devices share the work, their experts need not."""

from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals


class DeviceBalanceLoss(nn.Module):
    r""":math:`\sum_g f'_g P'_g` over the G devices of one layer (Dai et al., DeepSeekMoE, arXiv
    2401.06066, equations 15-17).

    Device g holds the g-th run of E/G consecutive experts. :math:`f'_g` is the mean over its
    experts of :math:`f_i = E c_i / \sum_j c_j`, with c the assignments asked for in the whole
    optimizer step (before capacity drops, without gradient); :math:`P'_g` is the *sum* of their
    mean ``router_probs``, which carries the gradient. 1 at balance, G when one device does it all.
    Padding is in neither.

    Raises:
        ValueError: E is not a multiple of ``num_devices``.
    """

    needs_step_sums = True

    def __init__(self, weight: float = 0.01, num_devices: int = 2) -> None:
        super().__init__()
        within("weight", weight, 0)
        within("num_devices", num_devices, 2)
        self.weight, self.num_devices = weight, num_devices

    def step_sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> Float[Tensor, "E"]:
        """Requested assignments of each expert."""
        return output.requests_per_expert.to(output.router_probs.dtype)

    def forward(
        self,
        output: RouterOutput,
        context: RoutingContext | None = None,
        totals: StepTotals | None = None,
    ) -> Float[Tensor, ""]:
        """This record's share of the step's loss; without ``totals``, the loss of the record."""
        if output.num_experts % self.num_devices:
            raise ValueError(
                f"num_devices={self.num_devices}: must divide the {output.num_experts} experts"
            )
        if totals is None:
            totals = StepTotals.of(output, context, self.step_sums(output, context))
        if totals.sums is None:
            raise ValueError("device_balance needs totals.sums: the step's assignments by expert")
        load = totals.sums / totals.sums.sum().clamp(min=1)
        probs = output.without_padding(output.router_probs).sum(0) / totals.num_tokens
        # mean of E c_i / sum c over E/G experts: G times the device's share of the assignments
        load, probs = load.view(self.num_devices, -1), probs.view(self.num_devices, -1)
        return self.num_devices * (load.sum(1) * probs.sum(1)).sum()
