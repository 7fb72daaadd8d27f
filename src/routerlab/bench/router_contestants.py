"""The routers that are compared, each with its losses as its config composes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from routerlab.bench.contestants import Shape
from routerlab.core.config import ConfigError, available, compose, nearest
from routerlab.core.instantiate import build_all
from routerlab.core.protocols import AuxLoss, LayerLoss
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.routers.build import with_balancer

REFERENCE = "token_choice"  # the router of the layer; measured in every run
CHEAPER = {"bip_once": ("bip", "iterations=1")}  # balancers with a cheaper setting of a knob
# The most percent of the layer that a contestant may cost, where that is not `TOP_K_GOAL`. Exact
# solvers have no goal.
GOALS = {
    "expert_choice": 4.0,
    "sinkhorn": 5.0,
    "selective_sinkhorn": 5.0,
    "s_base": 5.0,
    "token_choice+bip": 17.0,
    "base": None,
    "expert_choice_capped": None,
}
TOP_K_GOAL = 8.0


@dataclass(frozen=True, slots=True)
class RouterContestant:
    """A router and the losses on its records."""

    router: Any
    losses: Mapping[str, AuxLoss]

    def step(self, x: Tensor, context: RoutingContext, noise: Tensor) -> RouterOutput:
        """Forward, losses and backward from fresh gradients, then the update that follows an
        optimizer step. ``noise`` holds the gradient of the combine weights, and of ``log_prob``.
        """
        for leaf in (x, *self.router.parameters()):
            leaf.grad = None
        output = self.router(x, context)
        roots, grads = [output.combine_weights], [noise[: len(output.combine_weights)]]
        if output.log_prob is not None:  # a sampled choice learns by it
            roots.append(output.log_prob)
            grads.append(noise[: len(output.log_prob)])
        if self.losses:
            roots.append(self._weighted_losses(output, context))
            grads.append(torch.ones_like(roots[-1]))
        learned = [i for i, root in enumerate(roots) if root.requires_grad]
        if learned:
            torch.autograd.backward([roots[i] for i in learned], [grads[i] for i in learned])
        if output.proposal is not None:
            self.router.update(output.requests_per_expert, output.proposal)
        return output

    def _weighted_losses(self, output: RouterOutput, context: RoutingContext) -> Tensor:
        totals = StepTotals.of(output, context)  # this record is the whole step
        terms = []
        for loss in self.losses.values():
            sums = None
            if loss.needs_step_sums:
                with torch.no_grad():
                    sums = loss.step_sums(output, context)  # pyright: ignore
            terms.append(loss.weight * loss(output, context, replace(totals, sums=sums)))
        return torch.stack(terms).sum()


def build_contestant(name: str, shape: Shape, device: torch.device) -> RouterContestant:
    """What a name of `contestant_names` stands for, of a shape's size; K unless it has a number of
    its own, and logits of unit scale for tokens of one where they are linear.
    """
    router, _, balancer = name.partition("+")
    choices = [f"router={router}"]
    if balancer:
        file, *setting = CHEAPER.get(balancer, (balancer,))
        choices += [f"balancer={file}", *(f"balancer.{knob}" for knob in setting)]
    cfg = compose(*choices)
    make = with_balancer(cfg)
    knobs: dict[str, Any] = {"d_model": shape.d_model, "num_experts": shape.num_experts}
    if "init_std" in cfg.router:
        knobs["init_std"] = shape.d_model**-0.5
    picks: dict[str, Any] = {}
    if "top_k" in cfg.router:
        picks["top_k"] = shape.top_k
    elif "capacity_factor" in cfg.router:  # experts choose: K picks for each of the tokens
        picks["capacity_factor"] = float(shape.top_k)
    try:
        built = make(**knobs, **picks)
    except ValueError:
        built = make(**knobs)
    losses = build_all(cfg.get("loss"))
    on_records = {k: loss for k, loss in losses.items() if not isinstance(loss, LayerLoss)}
    return RouterContestant(built.to(device).train(), on_records)


def contestant_names(asked: str = "all") -> list[str]:
    """The names in a comma-separated list: routers, ``token_choice+BALANCER``, losses on weights;
    `REFERENCE` is always the first. `ConfigError` for a name that is none of these.
    """
    balancers = {*available("balancer"), *CHEAPER} - {"none"}
    balanced = [f"{REFERENCE}+{name}" for name in sorted(balancers)]
    routers = [name for name in available("router") if name != REFERENCE]
    known = [REFERENCE, *balanced, *routers, *layer_losses(available("loss"))]
    if asked == "all":
        return known
    chosen = [name.strip() for name in asked.split(",")]
    for name in chosen:
        if name not in known:
            raise ConfigError(f"routers={name!r}: no such contestant; {nearest(name, known)}")
    return list(dict.fromkeys([REFERENCE, *chosen]))


def layer_losses(names: Sequence[str]) -> dict[str, LayerLoss]:
    """Those of ``names`` that are losses which look at weights and at no token."""
    files = [name for name in available("loss") if name in names]
    every = build_all(compose(f"loss=[{','.join(files)}]").loss) if files else {}
    return {name: loss for name, loss in every.items() if isinstance(loss, LayerLoss)}


def goal_of(name: str) -> float | None:
    """The most percent of the layer that the contestant of this name may cost; None: no goal."""
    return GOALS.get(name, TOP_K_GOAL)
