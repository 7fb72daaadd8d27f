"""Routers that sample their choice: the policy gradient that repeated runs allow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from routerlab.core.checks import choice
from routerlab.estimators.rloo import reward_to_go, rloo_surrogate
from routerlab.objectives.sample_forms import FORMS
from routerlab.objectives.step import Records

DEFAULT_NUM_SAMPLES = 4


def policy_parameters(routers: Mapping[str, Any]) -> list[Tensor]:
    """Parameters that learn by policy gradient alone: those of routers that say ``samples``. Such
    a router reads detached tokens, and its records' gradients end in it.
    """
    return [
        parameter
        for router in routers.values()
        if getattr(router, "samples", False)
        for parameter in router.parameters()
        if parameter.requires_grad
    ]


def check_num_samples(num_samples: int | None, samples: bool) -> int:
    """Runs of each sequence; refuses a number that does not go with the routers."""
    if num_samples is None:
        return DEFAULT_NUM_SAMPLES if samples else 1
    if samples and num_samples < 2:
        raise ValueError(
            f"num_samples={num_samples}: the router samples its choice, and its estimator (RLOO) "
            "needs at least 2"
        )
    if not samples and num_samples != 1:
        raise ValueError(f"num_samples={num_samples}: no router samples, so it must be 1 or null")
    return num_samples


def check_form(form: str, routers: Mapping[str, Any]) -> None:
    """Refuses forms that do not exist, or that would lose gradients of routers that do not sample
    beside routers that do.
    """
    choice("sample_form", form, FORMS)
    others = [name for name, router in routers.items() if not getattr(router, "samples", False)]
    if form != "replicated" and others and len(others) < len(routers):
        raise ValueError(
            f"sample_form={form!r}: the router of {others[0]} does not sample, and would lose "
            "gradients; must be 'replicated' where only some routers sample"
        )


@dataclass(frozen=True, slots=True)
class Samples:
    """M runs of B sequences: losses and log-probabilities of the choices, position by position.

    ``losses`` are means over the targets of a sequence: they add up to its loss.
    """

    losses: Float[Tensor, "M B S"]  # detached
    log_probs: Float[Tensor, "M B S"]  # summed over layers
    num_targets: Int[Tensor, "B"]

    @classmethod
    def of(
        cls, token_losses: Sequence[Tensor], records: Sequence[Records], num_targets: Tensor
    ) -> "Samples":
        """The samples of some passes, each with its token losses [rows, S] in nats and records."""
        num_sequences, length = len(num_targets), token_losses[0].shape[1]
        found = [
            torch.stack([r.log_prob for r in by_layer.values() if r.log_prob is not None]).sum(0)
            for by_layer in records
        ]
        losses = torch.cat([losses.detach() for losses in token_losses])
        losses = losses.view(-1, num_sequences, length) / num_targets.clamp(min=1)[:, None]
        return cls(losses, torch.cat(found).view(-1, num_sequences, length), num_targets)

    def surrogates(
        self, step_targets: Float[Tensor, ""], credit: str = "sequence"
    ) -> Float[Tensor, "B"]:
        r"""Each sequence's term of a scalar whose gradient is the RLOO estimate for the step's mean
        task loss.

        With :math:`\ell_{bm}` the mean loss over the targets of sample m of sequence b, log Q the
        log-probability of all choices in it (summed over layers and real tokens) and :math:`w_b`
        the share of the step's targets that its M samples hold:
        :math:`w_b \sum_m \frac{\ell_{bm} - \bar\ell_b}{M - 1} \log Q_{bm}`
        (arXiv 2603.10160). ``reward_to_go`` lets each position answer only for the losses at and
        after it [reconstructed].
        """
        losses, log_probs = self.losses, self.log_probs
        if credit == "reward_to_go":
            losses = reward_to_go(losses)
        else:
            losses, log_probs = losses.sum(2, keepdim=True), log_probs.sum(2, keepdim=True)
        weights = len(losses) * self.num_targets / step_targets
        return weights * rloo_surrogate(log_probs, losses).sum(1)
