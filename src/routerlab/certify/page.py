"""``docs/routers.md``: every router in one line, with what was measured of it."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from routerlab.bench.timing import interleave
from routerlab.certify.certificate import Certificate
from routerlab.certify.subject import Subject, sharpen, update
from routerlab.core.config import config_dir, user_dirs
from routerlab.core.routing import RoutingContext

D_MODEL, NUM_EXPERTS, TOP_K = 128, 16, 2
BATCH, LENGTH = 8, 256  # T = 2048
REFERENCE = "token_choice"
STEPS = 1000  # of the router's own balancing, in the last of which the violation is measured

HEAD = """\
# Routers

Written by `routerlab certify router=all --write docs/routers.md`; do not edit.

- **causal**: in training and evaluation a token's routing depends on what no later token holds, and
  not on other sequences, except for places in line: in `switch` earlier sequences stand in the same
  queue (and the number of all tokens makes the capacity), `round_robin` counts the tokens before.
  "training looks ahead" where that holds in evaluation only.
- **balance**: what is promised; and measured, the largest requested load (before a capacity drops
  any) over the mean, minus 1, on skewed tokens in training mode, without losses, with frozen
  weights of unit logits, after {steps} updates of the router's own, if it makes any. 0 is
  perfect; {worst:g} is all tokens on the same {k} of {e} experts (15 where a token has one).
  `hash` saw 64 ids, all equally often, and `by_task` {b} tasks.
- **cost**: forward and backward of the router alone over that of `{reference}`
  (T={t}, D={d}, E={e}, K={k}, or 1 where that is the router's idea); the median of interleaved
  runs on one CPU, good to a tenth or so.
- **certificate**: `routerlab certify router=NAME` says more.

| router | what | paper | causal | balance: promised | measured | cost | certificate |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the page; None where a router could not be measured at this size."""

    certificate: Certificate
    violation: float | None
    cost: float | None


def write_page(entries: Sequence[Entry]) -> str:
    """The page's text."""
    head = HEAD.format(
        steps=STEPS,
        worst=NUM_EXPERTS / TOP_K - 1,
        k=TOP_K,
        e=NUM_EXPERTS,
        t=BATCH * LENGTH,
        b=BATCH,
        d=D_MODEL,
        reference=REFERENCE,
    )
    return head + "".join(f"| {' | '.join(_cells(entry))} |\n" for entry in entries)


def measure(
    subjects: Sequence[Subject], certificates: Sequence[Certificate], seconds: float
) -> list[Entry]:
    """Balance and cost of each router; ``seconds`` of timing a router."""
    costs = relative_costs({subject.name: subject.build for subject in subjects}, seconds)
    both = zip(subjects, certificates, strict=True)
    return [Entry(c, max_violation(s.build), costs.get(s.name)) for s, c in both]


@torch.no_grad()
def max_violation(build: Callable[..., Any]) -> float | None:
    """Largest over mean load, minus 1, once the router's own balancing has had `STEPS` steps."""
    generator = torch.Generator().manual_seed(0)
    lean = torch.randn(D_MODEL, generator=generator)  # what all tokens have in common
    try:
        router = _build(build)
        sharpen(router, D_MODEL**-0.5)
        for step in itertools.count(1):
            x = torch.randn(BATCH * LENGTH, D_MODEL, generator=generator) + lean
            output = router(x, _context(generator, step))
            if output.proposal is None or step == STEPS:
                return float(output.expert_load.max() * NUM_EXPERTS - 1)
            update(router, output)
    except (ValueError, RuntimeError):  # it does not come in this size
        return None


def relative_costs(builds: dict[str, Callable[..., Any]], seconds: float) -> dict[str, float]:
    """Time of each router's forward and backward pass over that of `REFERENCE`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * LENGTH, D_MODEL, generator=generator).requires_grad_()
    context = _context(generator, 0)
    steps = {}
    for name, build in {REFERENCE: Subject.of(REFERENCE).build, **builds}.items():
        try:
            step = partial(_step, _build(build), x, context)
            step()
        except (ValueError, RuntimeError):  # it does not come in this size
            continue
        steps[name] = step
    ratios, _ = interleave(steps, steps[REFERENCE], lambda: None, seconds)
    # the baseline runs after every router, whose memory it finds in the caches: it is a bit slower
    own = ratios[REFERENCE].median
    return {name: ratios[name].median / own for name in builds if name in ratios}


def comments(name: str) -> list[str]:
    """The comment lines that begin a router's config file."""
    for root in (*user_dirs(), config_dir()):
        path = root / "router" / f"{name}.yaml"
        if path.is_file():
            lines = (line for line in path.read_text().splitlines() if line.startswith("#"))
            return [line.lstrip("# ") for line in lines if "@package" not in line]
    return []


def _cells(entry: Entry) -> list[str]:
    certificate = entry.certificate
    told = comments(certificate.router)
    measured = "-" if entry.violation is None else f"{entry.violation:.2f}"
    cost = "-" if entry.cost is None else f"{entry.cost:.1f}"
    verdict = f"fail: {', '.join(certificate.failed)}" if certificate.failed else "pass"
    cells = [
        f"`{certificate.router}`",
        told[0] if told else "-",
        _tagged(told, "Paper:"),
        certificate.causal,
        _tagged(told, "Balance:"),
        measured,
        cost,
        verdict,
    ]
    return [cell.replace("|", "\\|") for cell in cells]


def _tagged(told: Sequence[str], tag: str) -> str:
    return next((line.removeprefix(tag).strip() for line in told if line.startswith(tag)), "-")


def _build(build: Callable[..., Any]) -> Any:
    """A router of the measured size in training mode, with `TOP_K` unless it picks only one."""
    sizes: dict[str, Any] = {"d_model": D_MODEL, "num_experts": NUM_EXPERTS}
    if getattr(build, "keywords", {}).get("top_k", 1) > 1:
        sizes["top_k"] = TOP_K
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(**sizes).train()


def _context(generator: torch.Generator, step: int) -> RoutingContext:
    return RoutingContext(
        batch_size=BATCH,
        sequence_length=LENGTH,
        task_ids=torch.arange(BATCH),
        noise_level=torch.rand(BATCH, generator=generator),
        sequence_embedding=torch.randn(BATCH, D_MODEL, generator=generator),
        progress=0.5,
        token_ids=torch.randint(64, (BATCH * LENGTH,), generator=generator),
        seed=step,
        step_seed=step,
    )


def _step(router: Any, x: Tensor, context: RoutingContext) -> None:
    x.grad = None
    router.zero_grad(set_to_none=True)
    output = router(x, context)
    terms = [output.combine_weights.square().sum()]
    if output.log_prob is not None:
        terms.append(output.log_prob.sum())
    loss = torch.stack(terms).sum()
    if loss.requires_grad:
        loss.backward()
