"""The fast path that autograd can still see through."""

from jaxtyping import Float
from torch import Tensor

from routerlab.core.protocols import Experts
from routerlab.core.routing import RouterOutput
from routerlab.ops.permute import combine, gather, sort_by_expert


def autograd(
    x: Float[Tensor, "T D"], output: RouterOutput, experts: Experts
) -> Float[Tensor, "T D"]:
    """The same as `loop`: sort assignments by expert, one grouped product a weight, sum back.

    No token is dropped or padded and no autograd op is made per expert. The copy there and the
    copy back are each other's gradient (`routerlab.ops.permute`), which is where the time of a
    naive version goes.
    """
    by = sort_by_expert(output)
    weights = output.combine_weights.index_select(0, by.order)
    y = experts(gather(x, by), output.tokens_per_expert, weights)
    return combine(y, by).to(x.dtype)
