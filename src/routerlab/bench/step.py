"""What losses and diagnostics add to a training step of a small language model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from routerlab.backbones.decoder import Decoder
from routerlab.bench.layer import Settings
from routerlab.bench.step_size import StepSize
from routerlab.bench.timing import Ratio, interleave
from routerlab.core.protocols import AuxLoss, Diagnostic
from routerlab.diagnostics.collection import flatten
from routerlab.diagnostics.expert_by_domain import ExpertByDomain
from routerlab.diagnostics.expert_load import ExpertLoad
from routerlab.diagnostics.experts_per_token import ExpertsPerToken
from routerlab.diagnostics.router_entropy import RouterEntropy
from routerlab.diagnostics.router_logits import RouterLogits
from routerlab.diagnostics.router_state import RouterState
from routerlab.diagnostics.selection_margin import SelectionMargin
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.losses.router_z import RouterZLoss
from routerlab.objectives.causal_lm import CausalLM
from routerlab.objectives.optimizer import OptimizerRecipe
from routerlab.routers.token_choice import TokenChoice

LOG_EVERY = 10  # the default of `RoutedObjective`
DOMAINS = ["a", "b", "c", "d"]


@dataclass(frozen=True, slots=True)
class StepShare:
    """Time of losses, and of diagnostics when computed on every step, in percent of the forward and
    backward pass of a step without either (the optimizer not counted, so shares are upper bounds).
    """

    milliseconds: float
    losses_percent: float
    diagnostics_percent: float
    losses: Ratio
    losses_and_diagnostics: Ratio

    @property
    def promised_percent(self) -> float:
        """Losses on every step, diagnostics on every `LOG_EVERY`-th."""
        return self.losses_percent + self.diagnostics_percent / LOG_EVERY


def bench_step(settings: Settings, size: StepSize | None = None) -> StepShare:
    """The shares, from steps with nothing, with losses and with both that take turns."""
    torch.manual_seed(settings.seed)
    size = size or StepSize()
    work = Work(size, settings)
    losses = {"load_balancing": LoadBalancingLoss(), "router_z": RouterZLoss()}
    contestants = {
        "losses": work.step(losses, due=False),
        "both": work.step(losses, due=True),
    }
    s, nothing = settings, work.step({}, due=False)
    timed, milliseconds = interleave(contestants, nothing, work.draw, s.seconds, s.device, s.clock)
    with_losses, both = timed["losses"], timed["both"]
    return StepShare(
        milliseconds=milliseconds,
        losses_percent=100 * (with_losses.median - 1),
        diagnostics_percent=100 * (both.median - with_losses.median),
        losses=with_losses,
        losses_and_diagnostics=both,
    )


def usual_diagnostics() -> dict[str, Diagnostic]:
    """The diagnostics of ``routerlab train``, by file name."""
    return {
        "expert_load": ExpertLoad(),
        "router_entropy": RouterEntropy(),
        "router_logits": RouterLogits(),
        "selection_margin": SelectionMargin(),
        "expert_by_domain": ExpertByDomain(),
        "experts_per_token": ExpertsPerToken(),
        "router_state": RouterState(),
    }


class Work:
    """One model, its batches, and training steps without trainer and optimizer."""

    def __init__(self, size: StepSize, settings: Settings) -> None:
        self.size, self.device = size, settings.device
        self.generator = torch.Generator(settings.device).manual_seed(settings.seed)
        self.backbone = Decoder(
            partial(TokenChoice, top_k=size.top_k),
            vocab_size=size.vocab_size,
            d_model=size.d_model,
            num_layers=size.num_layers,
            num_heads=size.num_heads,
            num_kv_heads=size.num_kv_heads,
            d_ff=size.d_ff,
            num_experts=size.num_experts,
            max_positions=size.sequence_length,
            qk_norm=True,
        ).to(settings.device)
        self.batch: dict[str, Tensor] = {}

    def draw(self) -> None:
        """A new batch."""
        rows, length = self.size.batch_size, self.size.sequence_length
        draw = partial(torch.randint, generator=self.generator, device=self.device)
        tokens = draw(0, self.size.vocab_size, (rows, length + 1))
        self.batch = {
            "input_ids": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "domain": draw(0, len(DOMAINS), (rows,)),
        }

    def step(self, losses: dict[str, AuxLoss], due: bool) -> Callable[[], object]:
        """Forward and backward of a step; when ``due``, also the diagnostics as they are logged."""
        objective = CausalLM(
            self.backbone,
            optimizer=OptimizerRecipe(torch.optim.AdamW),
            losses=losses,
            diagnostics=usual_diagnostics(),
            domains=DOMAINS,
        )

        def run() -> object:
            self.backbone.zero_grad(set_to_none=True)
            context = objective.context(self.batch, 0, 0)
            terms, sums, _ = objective.accumulate([self.batch], [context], due)
            return terms, flatten(sums.values(), "router")

        return run
