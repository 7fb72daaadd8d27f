"""Routing by task: every token of a sequence goes to the expert of its task."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from routerlab.core.checks import within
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.forced import forced_choice


class ByTask(nn.Module):
    """One expert a task with weight 1: the hard stage of LoRA-Mixer (Li et al., arXiv 2507.00029).

    Task number d uses expert d, so E experts serve E tasks, and learning is that of E separate
    models on shared frozen weights. It has no parameters and learns nothing; experts are loaded as
    their tasks are.

    Args:
        d_model: D; not used.
        num_experts: E, at least the number of tasks.
    """

    causal = True
    top_k = 1

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        within("num_experts", num_experts, 1)
        self.num_experts = num_experts

    def forward(
        self, x: Float[Tensor, "T D"], context: RoutingContext | None = None
    ) -> RouterOutput:
        """The record of one pick a token, for the tasks of ``context.task_ids``. ``router_probs``
        are 1 at the pick; logits are 0 and do not follow them.

        Raises:
            ValueError: no task ids, or one without an expert.
        """
        if context is None or context.task_ids is None:
            raise ValueError(
                "by_task routing reads context.task_ids: pass a RoutingContext with them, or train "
                "on data that has tasks"
            )
        tasks = context.task_ids.long()
        low, high = tasks.aminmax()
        within("context.task_ids", int(low), 0)
        if int(high) >= self.num_experts:
            raise ValueError(
                f"num_experts={self.num_experts}: must be at least {int(high) + 1}, as by_task "
                f"gives every task its expert and context.task_ids holds {int(high)}"
            )
        picks = tasks.repeat_interleave(len(x) // len(tasks))[:, None]
        probs = torch.zeros(len(x), self.num_experts, device=x.device)
        return forced_choice(x, picks, probs.scatter_(1, picks, 1.0), context)
