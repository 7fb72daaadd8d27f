"""How much of the policy gradient is signal: measured in training, at steps that are logged."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from routerlab.objectives.sampling import Samples
from routerlab.objectives.step import all_reduce, world_size

_GROUPS = 8


class PolicySignal:
    r"""Norm, variance and signal-to-noise ratio of the step's policy gradient, and how far the
    losses of M samples of the same input lie apart.

    The sequences of the step's last micro-batch are split into n groups (at most eight). Each has
    its own gradient :math:`g_i`; their sum is G. From their spread the total variance of G is
    :math:`V = \frac{n}{n-1} \sum_i |g_i - \bar g|^2`, over inputs and draws, and
    :math:`|E\,G|^2` is :math:`|G|^2 - V` without bias (so it may be below 0 where noise is all
    there is). A step of P such micro-batches, on all ranks, has P times the variance and P² times
    the squared mean.

    Args:
        parameters: of the routers that sample.
        micro_batches: of this rank's step.
    """

    def __init__(self, parameters: Sequence[Tensor], micro_batches: int) -> None:
        self.parameters, self.micro_batches = list(parameters), micro_batches
        zero = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)
        self._spread = torch.stack([zero, zero, zero])  # sums of std and of range, inputs
        self._moments = torch.stack([zero, zero, zero])  # variance, squared mean, measured

    @torch.no_grad()
    def add(self, samples: Samples) -> None:
        """The losses of a micro-batch."""
        losses = samples.losses.sum(2)[:, samples.num_targets > 0].double()
        spread = [losses.std(0).sum(), (losses.amax(0) - losses.amin(0)).sum()]
        self._spread += torch.stack([*spread, spread[0].new_tensor(losses.shape[1])])

    def measure(self, surrogates: Float[Tensor, "B"]) -> None:
        """The gradient of each sequence's surrogate, before it is used: graphs are kept."""
        groups = surrogates.tensor_split(min(_GROUPS, len(surrogates)))
        if len(groups) < 2:
            return
        rows = []
        for group in groups:
            found = torch.autograd.grad(
                group.sum(), self.parameters, retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([gradient.double().flatten() for gradient in found]))
        gradients = torch.stack(rows)
        spread = (gradients - gradients.mean(0)).square().sum()
        variance = spread * len(groups) / (len(groups) - 1)
        squared_mean = gradients.sum(0).square().sum() - variance
        self._moments += torch.stack([variance, squared_mean, torch.ones_like(variance)])

    def values(self) -> dict[str, float]:
        """The numbers of the step, equal on all ranks; call it when the gradients are there."""
        sums = all_reduce(torch.cat([self._spread, self._moments])).tolist()
        std, spread, inputs, variance, squared_mean, measured = sums
        norms = [p.grad.norm() for p in self.parameters if p.grad is not None]
        found = {"policy/grad_norm": float(torch.stack(norms).norm()) if norms else 0.0}
        if measured:
            pieces = self.micro_batches * world_size()
            found["policy/grad_variance"] = pieces * variance / measured
            ratio = pieces * squared_mean / variance if variance > 0 else 0.0
            found["policy/snr"] = ratio
        if inputs:
            found |= {"policy/loss_std": std / inputs, "policy/loss_range": spread / inputs}
        return found
