"""Group-limited choice: a token may use the experts of a few groups only."""

import torch
from jaxtyping import Float
from torch import Tensor


def limit_to_groups(
    scores: Float[Tensor, "T E"], num_groups: int, groups_per_token: int, best: int
) -> Float[Tensor, "T E"]:
    """``scores`` with minus infinity outside a token's best groups of neighbouring experts.

    A group's score is the sum of its ``best`` largest scores: 2 where a bias takes part, else 1
    (DeepSeek-V3, arXiv 2412.19437, and its published inference code).
    """
    grouped = scores.view(len(scores), num_groups, -1)
    of_group = grouped.topk(best, dim=-1).values.sum(-1)
    chosen = of_group.topk(groups_per_token, dim=-1).indices
    open_ = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, chosen, True)
    return grouped.masked_fill(~open_[..., None], -torch.inf).view_as(scores)
