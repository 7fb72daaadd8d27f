"""A micro-batch's share of a loss that is not linear in the sums of the step."""

from collections.abc import Callable

import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals, count_tokens


def share(
    value: Callable[[Tensor], Tensor],
    own: Tensor,
    totals: StepTotals | None,
    output: RouterOutput,
    context: RoutingContext | None = None,
) -> Tensor:
    r"""The share of :math:`v(\sum own)` that belongs to this record.

    ``own`` are its sums over tokens, with gradient; their step-wide total S comes in
    ``totals.sums``. The shares add up to :math:`v(S)`, and their gradients
    :math:`\nabla v(S) \cdot \partial own` to that of :math:`v(S)`: exact, however the step is cut.
    Without ``totals`` the record is the whole step and the result is :math:`v(own)`.
    """
    if totals is None:
        return value(own)
    if totals.sums is None:
        raise ValueError("this loss is not linear in its sums over tokens: it needs totals.sums")
    with torch.enable_grad():
        total = totals.sums.detach().to(own.dtype).requires_grad_()
        at_total = value(total)
        (slope,) = torch.autograd.grad(at_total, total)
    part = count_tokens(output, context)[0] / totals.num_tokens
    return part * at_total.detach() + (slope * (own - own.detach())).sum()
