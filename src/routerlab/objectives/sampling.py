"""Routers that sample their choice: repeated runs and the policy gradient that they allow."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from routerlab.estimators.rloo import reward_to_go, rloo_surrogate
from routerlab.objectives.step import Batch, Records


def policy_parameters(routers: Iterable[Any]) -> list[Tensor]:
    """Parameters that learn by policy gradient alone: those of routers that say ``samples``."""
    return [
        parameter
        for router in routers
        if getattr(router, "samples", False)
        for parameter in router.parameters()
    ]


def check_num_samples(num_samples: int | None, samples: bool) -> int:
    """Runs of each sequence; refuses a number that does not go with the routers."""
    if num_samples is None:
        return 2 if samples else 1
    if samples and num_samples < 2:
        raise ValueError(
            f"num_samples={num_samples}: the router samples its choice, and its estimator (RLOO) "
            "needs at least 2"
        )
    if not samples and num_samples != 1:
        raise ValueError(f"num_samples={num_samples}: no router samples, so it must be 1 or null")
    return num_samples


def repeat(batch: Batch, num_samples: int) -> Batch:
    """Every sequence ``num_samples`` times in a row."""
    if num_samples == 1:
        return batch
    return {key: value.repeat_interleave(num_samples, 0) for key, value in batch.items()}


def surrogate(
    token_losses: Float[Tensor, "B S"],
    num_targets: Int[Tensor, "B"],
    step_targets: Float[Tensor, ""],
    records: Records,
    num_samples: int,
    credit: str,
) -> Float[Tensor, ""]:
    r"""A scalar whose gradient is the RLOO estimate for the step's mean task loss.

    Rows come as `repeat` makes them. With :math:`\ell_{bm}` the mean loss over the targets of
    sample m of sequence b, log Q the log-probability of all choices in it (summed over layers and
    real tokens) and :math:`w_b` the share of the step's targets that its M samples hold:
    :math:`\sum_b w_b \sum_m \frac{\ell_{bm} - \bar\ell_b}{M - 1} \log Q_{bm}`
    (arXiv 2603.10160). ``reward_to_go`` lets each position answer only for the losses at and after
    it [reconstructed].
    """
    found = [output.log_prob for output in records.values() if output.log_prob is not None]
    log_probs = torch.stack(found).sum(0).view(token_losses.shape)
    losses = token_losses.detach() / num_targets.clamp(min=1)[:, None]
    if credit == "reward_to_go":
        losses = reward_to_go(losses)
    else:
        losses, log_probs = losses.sum(1, keepdim=True), log_probs.sum(1, keepdim=True)
    samples = (-1, num_samples, losses.shape[1])
    losses, log_probs = (t.view(samples).transpose(0, 1) for t in (losses, log_probs))
    weights = num_targets.view(-1, num_samples).sum(1) / step_targets
    return (weights * rloo_surrogate(log_probs, losses).sum(1)).sum()
