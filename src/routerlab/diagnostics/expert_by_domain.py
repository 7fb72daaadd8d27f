"""Which experts serve which labelled domain."""

from collections.abc import Mapping

import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext, count_experts


class ExpertByDomain:
    r"""``expert_by_domain`` [num_domains, E]: the share of a domain's tokens sent to each expert
    (OLMoE, arXiv 2409.02060, section 5.3); a row sums to K, and K/E is no preference.

    ``domain_information``: mutual information of domain and expert over :math:`\ln` of the number
    of domains, with domains weighted equally: 0 for no specialisation, 1 when the expert tells the
    domain. Kept assignments only. Empty without ``context.domain_ids``.
    """

    def sums(
        self, output: RouterOutput, context: RoutingContext | None = None
    ) -> dict[str, Tensor]:
        """Assignments [num_domains, E] and tokens [num_domains] of each domain."""
        if context is None or context.domain_ids is None:
            return {}
        num_domains = context.num_domains
        if num_domains < 1:
            raise ValueError("context.num_domains must be set where context.domain_ids is")
        domains = context.domain_ids.repeat_interleave(context.sequence_length)
        cell = domains[output.token_indices] * output.num_experts + output.expert_indices
        counts = count_experts(cell, num_domains * output.num_experts)
        tokens = count_experts(output.without_padding(domains), num_domains)
        return {"counts": counts.view(num_domains, -1), "tokens": tokens}

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The table and its mutual information."""
        if not sums:
            return {}
        table = sums["counts"] / sums["tokens"].clamp(min=1)[:, None]
        joint = table / table.sum(1, keepdim=True).clamp(min=1e-12)  # p(expert | domain)
        seen = sums["tokens"] > 0
        joint = joint[seen]
        marginal = torch.special.entr(joint.mean(0)).sum() if len(joint) else joint.sum()
        conditional = torch.special.entr(joint).sum(1).mean() if len(joint) else joint.sum()
        scale = max(float(seen.sum()), 2.0)
        return {
            "expert_by_domain": table,
            "domain_information": (marginal - conditional) / torch.tensor(scale).log(),
        }
