"""One MoE layer on several processes and on one, on the same tokens."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from routerlab.core.protocols import Dispatch
from routerlab.core.routing import RouterOutput
from routerlab.dispatch.expert_parallel import ExpertParallel
from routerlab.dispatch.loop import Loop
from routerlab.experts.swiglu import SwiGLU

D, F = 8, 4
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """``picks`` [T, K] are experts of all tokens; ``mask`` [T, E] says so where K differs."""

    tokens: tuple[int, ...]  # of each process
    picks: Tensor | None = None
    mask: Tensor | None = None
    num_experts: int = 4
    dtype: torch.dtype = torch.float64
    loss: str = "curved"
    recompute: bool = False
    autocast: bool = False

    def record(self, x: Tensor, gate: Tensor, rows: slice) -> RouterOutput:
        """The record of the tokens ``rows``, whose weights depend on ``gate``."""
        logits = x @ gate.T
        probs = logits.softmax(-1)
        if self.mask is not None:
            return RouterOutput.from_dispatch_mask(logits, probs, self.mask[rows], probs)
        assert self.picks is not None
        picks = self.picks[rows]
        return RouterOutput.from_top_k(logits, probs, picks, probs.gather(1, picks))


class Counting:
    """Counts the rows that a dispatch computes in this process."""

    def __init__(self, dispatch: Dispatch) -> None:
        self.dispatch, self.rows = dispatch, 0

    def __call__(self, x: Tensor, output: RouterOutput, experts: Any) -> Tensor:
        self.rows = len(x)
        return self.dispatch(x, output, experts)


def inputs(case: Case) -> tuple[Tensor, Tensor, SwiGLU]:
    """Tokens of all processes, the gate's weight and the experts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(case.tokens), D, generator=generator, dtype=torch.float64)
    gate = torch.randn(case.num_experts, D, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    experts = SwiGLU(D, F, case.num_experts).to(case.dtype)
    return x.to(case.dtype), gate.to(case.dtype), experts


def run(case: Case, dispatch: Dispatch, scale: float, rows: slice, given: Any) -> Results:
    """Output and gradients of the tokens ``rows``; the loss is multiplied by ``scale``."""
    x, gate, experts = given
    x, gate = x[rows].clone().requires_grad_(), gate.clone().requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return dispatch(x, case.record(x, gate, rows), experts)

    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        y = checkpoint(layer, x, use_reentrant=False) if case.recompute else layer(x)
    curved = case.loss == "curved"  # else the gradient is an expanded number
    loss = y.cos().sum() + y.square().sum() if curved else y.sum()
    (loss * scale).backward()
    gradients = {name: p.grad for name, p in experts.named_parameters()}
    return {"y": y.detach(), "x": x.grad / scale, "gate": gate.grad / scale} | gradients


def on_one_process(case: Case) -> Results:
    """All tokens by the readable reference."""
    return run(case, Loop(), 1, slice(None), inputs(case))


def on_each_process(case: Case, dispatch: ExpertParallel) -> tuple[Results, int]:
    """This process's tokens, and the gradients of the whole: the gate's summed over processes, the
    experts' as `ExpertParallel` leaves them. Losses are multiplied by the number of processes, as
    they are for DDP, which averages. And the rows that this process computed.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    x, gate, experts = inputs(case)
    dispatch.shard(experts, init_device_mesh("cpu", (size,)))
    counting = dispatch._local = Counting(dispatch._local)
    start = sum(case.tokens[:rank])
    rows = slice(start, start + case.tokens[rank])
    results = run(case, dispatch, size, rows, (x, gate, experts))
    dist.all_reduce(results["gate"])
    whole = {name: p.grad.full_tensor() for name, p in experts.named_parameters()}
    return results | whole, counting.rows


def run_cases(
    cases: dict[str, Case], dispatches: dict[str, ExpertParallel]
) -> dict[tuple[str, str], tuple[Results, int]]:
    """Every case with every dispatch; also with recomputed activations, which must not matter."""
    found = {}
    for kind, dispatch in dispatches.items():
        for name, case in cases.items():
            first = on_each_process(case, dispatch)
            again = on_each_process(replace(case, recompute=True), dispatch)
            torch.testing.assert_close(again, first, rtol=0, atol=0, equal_nan=True)
            found[kind, name] = first
    return found


def check(case: Case, answers: list[Results], tolerance: float, wanted: Results) -> None:
    """The processes' results together are those of one process."""
    ours = {key: torch.cat([answer[key] for answer in answers]) for key in ("y", "x")}
    assert ours["y"].shape == (sum(case.tokens), D)
    for answer in answers:
        for key, value in wanted.items():
            got = ours[key] if key in ours else answer[key]
            value = torch.zeros_like(got) if value is None else value
            torch.testing.assert_close(got, value, rtol=tolerance, atol=tolerance, msg=key)


def top_k(tokens: int, k: int, num_experts: int = 4) -> Tensor:
    """Random picks without repetition."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, num_experts, generator=generator).topk(k).indices


def crowded(tokens: int, share: float, num_experts: int = 4) -> Tensor:
    """One pick a token: expert 1 for a ``share`` of them, the others in turn for the rest."""
    picks = torch.arange(tokens) % num_experts
    picks[: int(share * tokens)] = 1
    return picks[torch.randperm(tokens, generator=torch.Generator().manual_seed(0))][:, None]
