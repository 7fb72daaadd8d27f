"""The fast path that autograd can still see through."""

import torch
from jaxtyping import Float
from torch import Tensor

from routerlab.core.protocols import Experts
from routerlab.core.routing import RouterOutput
from routerlab.ops.permute import combine, few_sizes, gather, sort_by_expert


class Autograd:
    """The same as `Loop`: sort assignments by expert, one grouped product a weight, sum back.

    No token is dropped or padded and no autograd op is made per expert. The copy there and the
    copy back are each other's gradient (`routerlab.ops.permute`), which is where the time of a
    naive version goes. Takes any experts and has derivatives of any order.
    """

    def __call__(
        self, x: Float[Tensor, "T D"], output: RouterOutput, experts: Experts
    ) -> Float[Tensor, "T D"]:
        by = sort_by_expert(output, few_sizes if _slow_to_meet_new_sizes(x) else None)
        y = experts(gather(x, by), by.tokens_per_expert, by.sort(output.combine_weights))
        return combine(y, by).to(x.dtype)


def _slow_to_meet_new_sizes(x: Tensor) -> bool:
    """True where oneDNN does the products: it builds a kernel for every new size, 1-2 ms each."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    return dtype in (torch.bfloat16, torch.float16)
