"""How a sequence was routed, as one vector: what chosen prompt tokens got, layer by layer."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from routerlab.core.checks import choice
from routerlab.core.routing import RouterOutput, RoutingContext

TOKENS = ("last1", "first1", "middle1", "last3")


def token_positions(context: RoutingContext, token: str = "last1") -> Int[Tensor, "B P"]:
    """Where in the batch of B S tokens the chosen prompt tokens of each sequence are.

    ``last1`` is the last prompt token, whose next-token logits answer; ``first1``, ``middle1`` and
    ``last3`` are those of RoMA's ablation (arXiv 2511.07419, figure 7). Padding may be on either
    side. Where the context tells no prompt, all real tokens count as one. A prompt that is too
    short for three repeats its first token; a sequence without one gives its last position.
    """
    choice("token", token, TOKENS)
    size = (context.batch_size, context.sequence_length)
    parts = [part.view(size) for part in (context.valid, context.prompt) if part is not None]
    read = torch.ones(size, dtype=torch.bool) if not parts else torch.stack(parts).all(0)
    seen = read.cumsum(1)
    count = seen[:, -1:]
    if token == "first1":
        ranks = torch.zeros_like(count)
    elif token == "middle1":
        ranks = count // 2
    else:
        last = 3 if token == "last3" else 1
        ranks = (count - torch.arange(last, 0, -1, device=count.device)).clamp(min=0)
    # The token of rank r (from 0) stands behind all positions that have seen at most r tokens.
    places = (seen[:, None] <= ranks[..., None]).sum(-1).clamp(max=size[1] - 1)
    return places + torch.arange(size[0], device=places.device)[:, None] * size[1]


def at_tokens(values: Float[Tensor, "T E"], positions: Int[Tensor, "B P"]) -> Float[Tensor, "B E"]:
    """The rows at these positions in float32 or wider; of several, their mean [reconstructed]."""
    rows = values[positions]
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).mean(1)


def routing_vectors(
    records: Mapping[str, RouterOutput],
    layers: Sequence[str],
    context: RoutingContext,
    token: str = "last1",
) -> Float[Tensor, "B R"]:
    r"""Each sequence's routing vector :math:`r_i`: the distributions over all experts, before
    selection, of these layers at its chosen prompt tokens, one after the other (RoMA, arXiv
    2511.07419, section 3). Gradient flows to the routers.
    """
    positions = token_positions(context, token)
    return torch.cat([at_tokens(records[name].router_probs, positions) for name in layers], dim=1)


def used_vectors(
    records: Mapping[str, RouterOutput],
    layers: Sequence[str],
    context: RoutingContext,
    token: str = "last1",
) -> Float[Tensor, "B R"]:
    """The same with 0 for experts that the tokens were not sent to; not renormalised."""
    positions = token_positions(context, token)
    used = [
        at_tokens(torch.where(record.dispatch_mask, record.router_probs, 0.0), positions)
        for record in (records[name] for name in layers)
    ]
    return torch.cat(used, dim=1)
