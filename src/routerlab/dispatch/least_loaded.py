"""Expert parallelism that lends experts to idle processes for one batch."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from routerlab.core.routing import RouterOutput
from routerlab.dispatch.expert_parallel import ExpertParallel, Placement
from routerlab.ops.least_loaded import Plan, plan_llep


class LeastLoaded(ExpertParallel):
    """Expert parallelism in which overloaded processes spill tokens, and the weights of their
    experts, to the least loaded (LLEP; Nguyen et al., arXiv 2601.17111, algorithms 2 to 4).

    Every token meets the same weights as before: output and gradients are those of
    `ExpertParallel`. What changes is the load of processes, not that of experts. All processes of a
    group find the same plan (`ops.least_loaded.plan_llep`) from the same counts. Lent weights are
    dropped after the layer; their gradients go back to the owner.

    Args:
        size: see `ExpertParallel`.
        alpha, min_tokens, threshold, trigger: see `ops.least_loaded.plan_llep`.
    """

    def __init__(
        self,
        size: int | None = None,
        alpha: int | float = 1.0,
        min_tokens: int = 1024,
        threshold: int | float | None = 1.3,
        trigger: str = "device",
    ) -> None:
        super().__init__(size)
        self._options: dict[str, Any] = {
            "alpha": alpha, "min_tokens": min_tokens, "threshold": threshold, "trigger": trigger,
        }  # fmt: skip
        plan_llep([0], 1, **self._options)  # refuses values out of range

    def place(self, output: RouterOutput, counts: Int[Tensor, "P E"], rank: int) -> Placement:
        """Every assignment to the process that the plan has for it."""
        plan = plan_llep(counts.sum(0).tolist(), len(counts), **self._options)
        if not plan.transfers:
            return super().place(output, counts, rank)
        return _planned(plan, output.expert_indices, counts, rank)


def _planned(
    plan: Plan, expert_indices: Int[Tensor, "N"], counts: Int[Tensor, "P E"], rank: int
) -> Placement:
    """A plan speaks of ranges of the group's tokens: here all assignments of the group stand in a
    row, by expert, then by process, then in the order of the process's record.
    """
    held, number = _number_copies(plan, counts.shape[1])
    ranges = [(e, number[e, r.device], r) for e, of in enumerate(plan.assignments) for r in of]
    experts = torch.tensor([expert for expert, _, _ in ranges])
    copies = torch.tensor([copy for _, copy, _ in ranges])
    sizes = torch.tensor([r.end - r.start for _, _, r in ranges])
    ends = sizes.cumsum(0)
    # the place in the row where a process's assignments to an expert begin
    begin = (counts.T.flatten().cumsum(0) - counts.T.flatten()).view(counts.T.shape).T
    low, high = begin[:, experts], (begin + counts)[:, experts]
    shared = (torch.minimum(high, ends) - torch.maximum(low, ends - sizes)).clamp(min=0)
    by_copy = counts.new_zeros(len(counts), sum(held)).index_add_(1, copies, shared)

    order = torch.sort(expert_indices, stable=True).indices
    own = counts[rank]
    shift = begin[rank] - (own.cumsum(0) - own)
    there = partial(Tensor.to, device=order.device, non_blocking=True)
    places = there(shift).repeat_interleave(there(own), output_size=len(order))
    places += torch.arange(len(order), device=order.device)
    chosen = there(copies)[torch.bucketize(places, there(ends), right=True)]
    return Placement(
        order.new_empty(len(order)).index_copy_(0, order, chosen), by_copy, held, plan.transfers
    )


def _number_copies(plan: Plan, num_experts: int) -> tuple[list[int], dict[tuple[int, int], int]]:
    """How many copies each process has, and the number of the copy of an expert on a process."""
    num_processes = len(plan.device_load)
    owned = num_experts // num_processes
    on = [list(range(p * owned, (p + 1) * owned)) for p in range(num_processes)]
    for transfer in sorted(plan.transfers):
        on[transfer.target].append(transfer.expert)
    pairs = [(expert, process) for process, experts in enumerate(on) for expert in experts]
    return [len(experts) for experts in on], {pair: number for number, pair in enumerate(pairs)}
