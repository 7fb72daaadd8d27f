"""What a forward pass computes, counted operation by operation."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from routerlab.core.routing import RoutingContext
from routerlab.dispatch.autograd import Autograd
from routerlab.dispatch.kernels import Kernels


@torch.no_grad()
def forward_flops(
    backbone: nn.Module, input_ids: Int[Tensor, "B S"], context: RoutingContext | None = None
) -> int:
    """Floating-point operations of one forward pass in evaluation mode: those of matrix products
    and attention, a multiplication and an addition being two. What only moves, adds up or scales
    numbers (norms, softmax, rotary positions, the way to the experts and back) is left out.

    Attention counts as a full S x S product, though half of it is masked, and experts with the
    tokens that they get here, so routers that send a token to more of them cost more. Nothing is
    taken from a cache (`Decoder.keep_trunk`).
    """
    model: Any = backbone
    was_training, trunk = model.training, getattr(model, "_trunk", None)
    unseen = [m for m in model.modules() if isinstance(getattr(m, "dispatch", None), Kernels)]
    dispatches = [layer.dispatch for layer in unseen]
    model.eval()
    for layer in unseen:  # the same products, by operations that are counted
        layer.dispatch = Autograd()
    if hasattr(model, "keep_trunk"):
        model._trunk = None
    try:
        with FlopCounterMode(display=False, custom_mapping=_UNKNOWN) as counter:
            model(input_ids, context)
    finally:
        model.train(was_training)
        for layer, dispatch in zip(unseen, dispatches, strict=True):
            layer.dispatch = dispatch
        if hasattr(model, "keep_trunk"):
            model._trunk = trunk
    return counter.get_total_flops()


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return sdpa_flop_count(query, key, value)


def _grouped(
    x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    """Rows [N A] by one of the matrices [E A C] each."""
    return 2 * x[-1] * out_shape[0] * out_shape[1]


# Operations of ours and of transformers that torch's counter does not know.
_UNKNOWN: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._grouped_mm: _grouped,
}
