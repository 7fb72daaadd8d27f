"""What stands for a sequence where its routing is decided once: the mean of its prompt."""

import torch
from jaxtyping import Float
from torch import Tensor

from routerlab.core.routing import RoutingContext


def prompt_mean(
    x: Float[Tensor, "T D"], context: RoutingContext | None = None
) -> Float[Tensor, "B D"]:
    """The mean of each sequence's prompt tokens, or of all its real tokens where the context tells
    no prompt, in float32 or wider; 0 for a sequence without such a token. No context: one sequence.
    """
    num_sequences = 1 if context is None else context.batch_size
    x = x.to(torch.promote_types(x.dtype, torch.float32)).view(num_sequences, -1, x.shape[1])
    read = None if context is None else context.valid
    if context is not None and context.prompt is not None:
        read = context.prompt if read is None else read & context.prompt
    if read is None:
        return x.mean(1)
    read = read.view(num_sequences, -1, 1)
    return torch.where(read, x, 0.0).sum(1) / read.sum(1).clamp(min=1)
