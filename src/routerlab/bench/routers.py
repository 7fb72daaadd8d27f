"""What routers cost: forward and backward as a share of an MoE layer's."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from routerlab.bench.contestants import Shape, build_ours, reference_layer
from routerlab.bench.layer import Settings, Tokens
from routerlab.bench.router_contestants import (
    REFERENCE,
    RouterContestant,
    build_contestant,
    goal_of,
    layer_losses,
)
from routerlab.bench.step import StepSize, Work
from routerlab.bench.timing import Ratio, interleave
from routerlab.core.protocols import LayerLoss
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.core.seeding import stable_seed
from routerlab.dispatch.fused import Fused
from routerlab.moe.layer import MoE

LAYER_LOSS_GOAL = 2.0  # percent of a training step
_VOCABULARY, _SEQUENCE_LENGTH = 256, 128

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RouterRow:
    """One contestant. Without ``status == "ok"`` there are no figures.

    ``percent`` (with quartiles) is its time as a share of that of ``share_of``, ``to_token_choice``
    its time over that of plain token choice. ``learns``: a gradient came back to the tokens or to
    its parameters. ``met``: the share is within the goal, where there is one.
    """

    name: str
    goal: float | None
    share_of: str = "layer"  # or "step"
    status: str = "ok"
    losses: list[str] = field(default_factory=list)
    percent: float | None = None
    lower: float | None = None
    upper: float | None = None
    milliseconds: float | None = None
    to_token_choice: float | None = None
    assignments_per_token: float | None = None
    learns: bool | None = None
    met: bool | None = None
    samples: int | None = None
    busy: int | None = None

    def timed(self, ratio: Ratio) -> "RouterRow":
        """The row with the figures of a ratio to what it is a share of."""
        return replace(
            self,
            percent=100 * ratio.median,
            lower=100 * ratio.lower,
            upper=100 * ratio.upper,
            milliseconds=ratio.milliseconds,
            met=None if self.goal is None else 100 * ratio.median <= self.goal,
            samples=ratio.samples,
            busy=ratio.busy,
        )


@dataclass(frozen=True, slots=True)
class RoutersFound:
    """The rows of a run, and the milliseconds of what they are shares of."""

    shape: str
    rows: list[RouterRow]
    layer_milliseconds: float
    step_milliseconds: float | None


def bench_routers(
    shape: Shape,
    names: Sequence[str],
    settings: Settings,
    progress: Progress = lambda text: None,
    step_size: StepSize | None = None,
) -> RoutersFound:
    """A row for each of ``names`` (see `contestant_names`), in that order."""
    torch.manual_seed(settings.seed)
    losses = layer_losses(names)
    rows, layer = _Cell(shape, settings).measure([n for n in names if n not in losses], progress)
    step = None
    if losses:
        progress(f"timing {', '.join(losses)} in a training step")
        more, step = _in_a_step(losses, settings, step_size or StepSize())
        rows |= more
    return RoutersFound(str(shape), [rows[name] for name in names], layer, step)


class _Cell:
    """The routers of one shape, what they are shown and told, and the layer beside them."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        device = settings.device
        self.tokens = Tokens(shape, device, settings.seed)
        self.layer = build_ours(reference_layer(shape, device), Fused)
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        size = shape.tokens * shape.num_experts  # no record holds more assignments
        self.noise = torch.empty(size, device=device).normal_(generator=self.generator)
        self.draws = 0
        self.draw()

    def draw(self) -> None:
        """New tokens and a new context, in which whatever a router may ask for is set."""
        self.tokens.draw()
        self.draws += 1
        length = math.gcd(self.shape.tokens, _SEQUENCE_LENGTH)
        rows = self.shape.tokens // length
        how: dict[str, Any] = {"generator": self.generator, "device": self.settings.device}
        seed = stable_seed(self.settings.seed, self.draws)
        self.context = RoutingContext(
            batch_size=rows,
            sequence_length=length,
            domain_ids=torch.randint(2, (rows,), **how),
            num_domains=2,
            task_ids=torch.randint(2, (rows,), **how),
            noise_level=torch.rand(rows, **how),
            sequence_embedding=torch.randn(rows, self.shape.d_model, **how),
            progress=0.5,
            token_ids=torch.randint(_VOCABULARY, (self.shape.tokens,), **how),
            seed=seed,
            step_seed=seed,
        )

    def measure(
        self, names: Sequence[str], progress: Progress
    ) -> tuple[dict[str, RouterRow], float]:
        """The rows of contestants that take turns with the layer, and its milliseconds."""
        rows: dict[str, RouterRow] = {}
        steps: dict[str, Callable[[], object]] = {}
        for name in names:
            progress(f"{name}: trying a step")
            try:
                contestant = build_contestant(name, self.shape, self.settings.device)
                rows[name] = self._try(name, contestant)
            except (ValueError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                rows[name] = RouterRow(name, goal_of(name), status=f"not supported: {reason}")
            else:
                steps[name] = partial(self._step, contestant)
        progress(f"{self.shape}: timing {', '.join(steps)}")
        s, x, dy = self.settings, self.tokens.x, self.tokens.dy
        timed, layer = interleave(
            steps, lambda: self.layer.step(x, dy), self.draw, s.seconds, s.device, s.clock
        )
        rows |= {name: rows[name].timed(ratio) for name, ratio in timed.items()}
        own = rows[REFERENCE].percent
        for name, row in rows.items():
            if own is not None and row.percent is not None:
                rows[name] = replace(row, to_token_choice=row.percent / own)
        return rows, layer

    def _step(self, contestant: RouterContestant) -> RouterOutput:
        return contestant.step(self.tokens.x, self.context, self.noise)

    def _try(self, name: str, contestant: RouterContestant) -> RouterRow:
        self.draw()
        output = self._step(contestant)
        return RouterRow(
            name,
            goal_of(name),
            losses=list(contestant.losses),
            assignments_per_token=len(output.token_indices) / self.shape.tokens,
            learns=_has_gradient(contestant.router, self.tokens.x),
        )


def _in_a_step(
    losses: Mapping[str, LayerLoss], settings: Settings, size: StepSize
) -> tuple[dict[str, RouterRow], float]:
    """Rows of losses on weights, over all layers, and the milliseconds of a step without them."""
    work = Work(size, settings)
    layers = [module for module in work.backbone.modules() if isinstance(module, MoE)]

    def step(loss: LayerLoss) -> None:
        work.backbone.zero_grad(set_to_none=True)
        context = RoutingContext(size.batch_size, size.sequence_length, step_seed=settings.seed)
        values = [loss.of_layer(layer, context.at_layer(i)) for i, layer in enumerate(layers)]
        (loss.weight * torch.stack(values).mean()).backward()

    rows: dict[str, RouterRow] = {}
    for name, loss in losses.items():
        step(loss)
        learns = _has_gradient(work.backbone)
        rows[name] = RouterRow(name, LAYER_LOSS_GOAL, "step", losses=[name], learns=learns)
    steps = {name: partial(step, loss) for name, loss in losses.items()}
    s, plain = settings, work.step({}, due=False)
    timed, milliseconds = interleave(steps, plain, work.draw, s.seconds, s.device, s.clock)
    return {name: rows[name].timed(ratio) for name, ratio in timed.items()}, milliseconds


def _has_gradient(module: nn.Module, *more: Tensor) -> bool:
    """Whether a gradient came back to a parameter or to ``more``."""
    leaves = (*module.parameters(), *more)
    return any(leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves)
