"""The router under test, and what two of its records have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from routerlab.certify.probes import D_MODEL, Probe, probe
from routerlab.core.config import compose
from routerlab.core.routing import RouterOutput
from routerlab.routers.build import with_balancer

NUM_EXPERTS = 8
TOLERANCE = 1e-4  # float32 sums in another order; what is looked for is larger


@dataclass(frozen=True)
class Subject:
    """A router by name: ``build(d_model=, num_experts=)`` makes a fresh one."""

    name: str
    build: Callable[..., Any]

    @classmethod
    def of(cls, name: str, words: Sequence[str] = ()) -> "Subject":
        """A router of ``configs/router``, as the command line composes it."""
        return cls(name, with_balancer(compose(f"router={name}", *words)))

    def router(self, training: bool = False, seed: int = 0) -> Any:
        """A router with logits of size 2 or so, after three steps of its own balancing: neither
        near-uniform scores nor a state that is still all zeros hide what the checks look for.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            router = self.build(d_model=D_MODEL, num_experts=NUM_EXPERTS)
        sharpen(router)
        router.train()
        for step in range(3):
            update(router, run(router, probe(3, 8, seed=50 + step)))
        return router.train(training)

    def is_random(self, training: bool) -> bool:
        """Whether another seed gives another record."""
        router, shown = self.router(training), probe(3, 8)
        records = [view(run(router, shown.reseeded(seed))) for seed in range(10)]
        return any(bool(records[0].moved(record).any()) for record in records[1:])


@torch.no_grad()
def sharpen(router: nn.Module, std: float = 0.5) -> None:
    """Gives the gate's weights this standard deviation: 0.5 makes logits of 2 for tokens of 1."""
    weight = getattr(getattr(router, "gate", None), "weight", None)
    if not isinstance(weight, Tensor) or weight.numel() < 2:
        return
    if weight.std() == 0:  # all experts tie
        generator = torch.Generator().manual_seed(weight.numel())
        weight.copy_(torch.randn(weight.shape, generator=generator))
    weight.mul_(std / weight.std())


def run(router: Any, shown: Probe) -> RouterOutput:
    """The record of a probe, without gradients."""
    with torch.no_grad():
        return router(shown.x, shown.context)


def update(router: Any, output: RouterOutput) -> None:
    """The router's own step after the optimizer's, as if this record were the whole step."""
    if output.proposal is not None:
        router.update(output.requests_per_expert, output.proposal.detach())


def declares(router: nn.Module, training: bool) -> bool:
    """``causal`` or ``causal_training``, of the router and the parts that say it for themselves."""
    return all(_causal(module, training) for module in router.modules())


def says(router: nn.Module, what: str) -> bool:
    """Whether the router or a part of it declares this: ``order_dependent``, or ``ties`` where two
    experts come out equal by construction and the lower number is taken.
    """
    return any(bool(getattr(module, what, False)) for module in router.modules())


def _causal(module: nn.Module, training: bool) -> bool:
    causal = bool(getattr(module, "causal", True))
    return bool(getattr(module, "causal_training", causal)) if training else causal


@dataclass(frozen=True)
class View:
    """A record in dense form, so that rows (tokens) and columns (experts) can be compared."""

    fields: dict[str, Tensor]  # [T, ...] each
    dropped: Int[Tensor, "E"]

    def rows(self, index: Tensor) -> "View":
        """The tokens at ``index``, an order or a mask."""
        return View({name: value[index] for name, value in self.fields.items()}, self.dropped)

    def columns(self, order: Int[Tensor, "E"]) -> "View":
        """The experts in another order."""
        flat = {name: v if v.ndim == 1 else v[:, order] for name, v in self.fields.items()}
        return View(flat, self.dropped[order])

    def moved(self, other: "View") -> Bool[Tensor, "T"]:
        """Tokens of which anything differs."""
        moved = torch.zeros(len(self.fields["weights"]), dtype=torch.bool)
        for name in self.fields:
            moved |= self._differs(other, name)
        return moved

    def difference(self, other: "View") -> str | None:
        """What differs, in words; None where nothing does."""
        for name in self.fields:
            if name not in other.fields:
                return f"{name} is missing"
            count = int(self._differs(other, name).sum())
            if count:
                return f"{name} of {count} of {len(self.fields[name])} tokens"
        return None if torch.equal(self.dropped, other.dropped) else "dropped_per_expert"

    def _differs(self, other: "View", name: str) -> Bool[Tensor, "T"]:
        ours, theirs = self.fields[name].double(), other.fields[name].double()
        same = torch.isclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        return ~same.flatten(1).all(1) if same.ndim > 1 else ~same


def view(output: RouterOutput) -> View:
    """The dense form of a record."""
    logits = output.router_logits.detach()
    weights = torch.zeros_like(logits)
    places = (output.token_indices, output.expert_indices)
    weights.index_put_(places, output.combine_weights.detach().to(logits.dtype), accumulate=True)
    fields = {
        "choice": output.dispatch_mask,
        "weights": weights,
        "router_probs": output.router_probs.detach(),
        "router_logits": logits,
    }
    for name in ("log_prob", "selection_probs"):
        value = getattr(output, name)
        if value is not None:
            fields[name] = value.detach()
    return View(fields, output.dropped_per_expert)
