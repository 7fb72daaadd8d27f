"""Expert choice with a cap on the experts of a token: a smooth optimum, rounded to a choice."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_TIE_BREAK = 1e-2  # in units of the temperature: far below what the plan can tell apart


def capped_choice(
    scores: Float[Tensor, "G E n"],
    slots: int,
    cap: int,
    temperature: float = 0.001,
    iterations: int = 100,
    repair: bool = True,
) -> Bool[Tensor, "G E n"]:
    r"""Each expert's ``slots`` tokens with the largest entries of `capped_plan`, in each group.

    The plan is seldom converged at the paper's temperature, and then its largest entries break the
    cap. ``repair`` ends that [reconstructed]: tokens over the cap keep their best ``cap`` experts,
    and the experts that lost tokens take their best ones among those that have room. Then every
    expert has exactly ``slots`` tokens and no token more than ``cap`` experts.

    Raises:
        ValueError: no such choice exists: ``slots > n``, or ``E * slots > cap * n``.
    """
    plan = capped_plan(scores, slots, cap, temperature, iterations)
    picks = plan.topk(slots, dim=-1).indices
    chosen = torch.zeros_like(plan, dtype=torch.bool).scatter_(-1, picks, True)
    return _repaired(chosen, plan, slots, cap) if repair else chosen


@torch.no_grad()
def capped_plan(
    scores: Float[Tensor, "G E n"],
    slots: int,
    cap: int,
    temperature: float = 0.001,
    iterations: int = 100,
) -> Float[Tensor, "G E n"]:
    r"""The logarithm of the plan A of capped expert choice (arXiv 2202.09368, section 3.3):

    .. math:: \max_A \langle S, A \rangle + \lambda H(A), \quad \sum_j A_{ij} = k, \quad
        \sum_i A_{ij} \le b, \quad 0 \le A \le 1

    by Dykstra's alternating projections in KL divergence on rows, columns and box
    [reconstructed: the paper names the algorithm only]. The row constraint is an equality, so it
    needs no correction term. Exact ties would leave A fractional: expert i slightly prefers tokens
    from place :math:`i n / E` on [reconstructed].

    Returned as it enters the last projection on the box: ``result.clamp(max=0)`` is log A, and what
    lies above 0 ranks the entries that are 1.
    """
    num_experts, num_tokens = scores.shape[1:]
    if slots > num_tokens or num_experts * slots > cap * num_tokens:
        raise ValueError(
            f"slots={slots}: {num_experts} experts with that many of {num_tokens} tokens each "
            f"need at least {num_experts * slots / num_tokens:.3g} experts a token and at most "
            f"{num_tokens} slots, but cap={cap}"
        )
    log_plan = scores / temperature - _tie_break(num_experts, num_tokens, scores.device)
    log_slots, log_cap = math.log(max(slots, 1)), math.log(cap)
    before_box = log_plan
    column = torch.zeros_like(log_plan[:, :1])
    box = torch.zeros_like(log_plan)
    for _ in range(iterations):
        log_plan = log_plan + (log_slots - _logsumexp(log_plan, -1))
        log_plan += column
        column = (_logsumexp(log_plan, -2) - log_cap).clamp_(min=0)
        log_plan -= column
        before_box = log_plan + box
        log_plan = before_box.clamp(max=0)
        box = before_box - log_plan
    return before_box


def _logsumexp(x: Float[Tensor, "G E n"], dim: int) -> Tensor:
    """`torch.logsumexp` without underflow, which makes exp twenty times slower on CPU."""
    highest = x.amax(dim, keepdim=True)
    return (x - highest).clamp_(min=-80).exp_().sum(dim, keepdim=True).log_() + highest


def _tie_break(num_experts: int, num_tokens: int, device: torch.device) -> Float[Tensor, "E n"]:
    tokens = torch.arange(num_tokens, device=device)
    start = torch.arange(num_experts, device=device)[:, None] * num_tokens // num_experts
    return (tokens - start) % num_tokens * (_TIE_BREAK / num_tokens)


def _repaired(
    chosen: Bool[Tensor, "G E n"], rank: Float[Tensor, "G E n"], slots: int, cap: int
) -> Bool[Tensor, "G E n"]:
    """The nearby choice that keeps the cap, with ``slots`` tokens for every expert.

    In rounds, experts that are short ask for their best tokens with room, and tokens take the best
    of those that ask. Nothing here depends on how experts and tokens are numbered.
    """
    most = min(cap, chosen.shape[1])
    chosen = _best(rank, chosen, most, most, dim=1)
    while True:
        room = cap - chosen.sum(1, keepdim=True)
        need = slots - chosen.sum(2, keepdim=True)
        asked = _best(rank, ~chosen & (room > 0), need, slots, dim=2)
        if not asked.any():
            break
        chosen |= _best(rank, asked, room, most, dim=1)
    for group in need.flatten(1).any(1).nonzero()[:, 0].tolist():
        _swap(chosen[group], rank[group], slots, cap)
    return chosen


def _best(
    rank: Float[Tensor, "G E n"],
    allowed: Bool[Tensor, "G E n"],
    count: Tensor | int,
    most: int,
    dim: int,
) -> Bool[Tensor, "G E n"]:
    """The ``count`` best allowed entries of each line along ``dim``; ``count`` <= ``most``."""
    top = rank.masked_fill(~allowed, -torch.inf).topk(most, dim=dim).indices
    places = torch.arange(most, device=rank.device)
    inside = (places if dim == 2 else places[:, None]) < count
    best = torch.zeros_like(allowed).scatter_(dim, top, inside.expand_as(top))
    return best & allowed


def _swap(chosen: Bool[Tensor, "E n"], rank: Float[Tensor, "E n"], slots: int, cap: int) -> None:
    """Fills the experts that are still short, in place: they hold every token that has room.

    The shortest expert takes a token from a donor, and the donor takes one with room instead. There
    is such a donor: some expert lacks that token (fewer than ``cap`` have it), holds no fewer
    tokens than the shortest, and so holds one that the shortest lacks.
    """
    while True:
        sizes = chosen.sum(1)
        least = sizes.min()
        if least >= slots:
            return
        wish = rank.masked_fill(chosen, -torch.inf).amax(1)
        short = int(wish.masked_fill(sizes > least, -torch.inf).argmax())
        room = chosen.sum(0) < cap
        token = int(rank[short].masked_fill(~room, -torch.inf).argmax())
        possible = chosen & ~chosen[short] & ~chosen[:, token, None]
        gain = rank[short] - rank + rank[:, token, None]
        gain = gain.masked_fill(~possible, -torch.inf)
        donor, given = divmod(int(gain.argmax()), gain.shape[1])
        chosen[donor, given], chosen[donor, token], chosen[short, given] = False, True, True
