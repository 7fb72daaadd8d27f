"""One optimizer step of a routed model: micro-batches, ranks, auxiliary losses, diagnostics."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from routerlab.core.checks import choice
from routerlab.core.errors import NonFiniteLossError
from routerlab.core.protocols import AuxLoss, Diagnostic, LayerLoss, RecordsLoss, Schedule
from routerlab.core.routing import RoutingContext
from routerlab.core.seeding import stable_seed
from routerlab.diagnostics.collection import DiagnosticSums, flatten
from routerlab.objectives import sampling
from routerlab.objectives.auxiliary import AuxiliaryLosses
from routerlab.objectives.blame import blame
from routerlab.objectives.finite import Attempt, FiniteSteps
from routerlab.objectives.lookahead import worst_mark
from routerlab.objectives.optimizer import OptimizerRecipe
from routerlab.objectives.router_state import update_routers
from routerlab.objectives.sample_forms import flat
from routerlab.objectives.scheduled import Scheduled
from routerlab.objectives.sharding import shard, why_not_shardable
from routerlab.objectives.step import Batch, all_reduce, rank, split_batch
from routerlab.objectives.step_gradient import StepGradient
from routerlab.objectives.validation import Scores
from routerlab.ops.sharded import whole
from routerlab.test_time.plug_in import TestTime, rerouting


class RoutedObjective(StepGradient):
    r"""A task loss plus weighted auxiliary losses: a batch is one optimizer step of this rank.

    .. math:: \frac{\sum_n \ell_n}{\#n} + \sum_{loss} w_{loss} \frac{1}{L} \sum_l loss(layer\ l)

    All sums run over the whole step, whatever ``micro_batches`` and the number of ranks: those are
    knobs for memory and speed, not for results. The exceptions say so themselves: a capacity
    (its queue is the micro-batch's), noise (drawn for each micro-batch), losses of scope
    ``micro_batch``, and routers and balancers that solve something for each micro-batch (Sinkhorn
    plans, BIP prices, BASE assignments, expert choice over a batch). Where a loss needs sums of the
    whole step before the first backward pass (``needs_step_sums``), more than one micro-batch costs
    a forward pass without gradients to take them; that is the price of exactness.

    Routers that sample their choice learn by RLOO: each sequence is run ``num_samples`` times, and
    the losses of these runs weigh the log-probabilities of their choices (`objectives.sampling`).
    Routers that keep state between steps (biases, prices, thresholds) change it once, right after
    the optimizer step.

    A subclass says what the task is: `task_loss` and `validation_scores`; ``gives_prompt`` where
    its batches tell the prompt from the rest.

    Args:
        backbone: ``(input_ids, context) -> BackboneOutput``.
        optimizer: optimizer and learning-rate schedule.
        losses, diagnostics, schedules: by name.
        seed: of the run; what a router draws depends on it, the step, micro-batch and rank.
        micro_batches: pieces into which a rank's batch is cut.
        gradient_clip_norm: largest norm of the gradient; null does not clip. The policy gradient of
            sampling routers is noisy, and clipped on its own.
        num_samples: M, runs of each sequence in a step; null: 4 if a router samples
            [reconstructed], else 1.
        sample_form: how they are run (`sample_forms.cut`): ``replicated`` (one pass over M copies),
            ``looped`` (M passes, the memory of one) or ``cheap`` (M - 1 of them without gradients:
            all but the routers learn from one sample).
        credit: which losses a sampled choice answers for: ``sequence`` (all of its sequence's) or
            ``reward_to_go`` (those at its position and after).
        log_every: diagnostics are computed on every n-th step.
        domains: names of the labels in ``batch["domain"]``.
    """

    gives_prompt = False

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        losses: Mapping[str, AuxLoss | LayerLoss | RecordsLoss],
        diagnostics: Mapping[str, Diagnostic],
        schedules: Mapping[str, Schedule] | None = None,
        seed: int = 0,
        micro_batches: int = 1,
        gradient_clip_norm: float | None = 1.0,
        num_samples: int | None = None,
        sample_form: str = "replicated",
        credit: str = "sequence",
        log_every: int = 10,
        domains: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        for name, value in (("micro_batches", micro_batches), ("log_every", log_every)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if gradient_clip_norm is not None and gradient_clip_norm <= 0:
            raise ValueError(f"gradient_clip_norm={gradient_clip_norm}: must be above 0, or null")
        self.backbone, self.recipe = backbone, optimizer
        self.losses, self.diagnostics = AuxiliaryLosses(losses), dict(diagnostics)
        self.schedules = Scheduled(schedules or {}, losses, list(self._routers().values()))
        self.looks_ahead = worst_mark(backbone, self.schedules, self.gives_prompt)
        self.policy = sampling.policy_parameters(self._routers())
        self.num_samples = sampling.check_num_samples(num_samples, bool(self.policy))
        sampling.check_form(sample_form, self._routers())
        choice("credit", credit, ("sequence", "reward_to_go"))
        self.seed, self.micro_batches, self.log_every = seed, micro_batches, log_every
        self.sample_form, self.credit = sample_form, credit
        self.gradient_clip_norm = gradient_clip_norm
        self.domains = domains or ["all"]
        self._steps = FiniteSteps()
        self.loaded_step: int | None = None  # of a checkpoint that is only evaluated
        self.test_time: TestTime | None = None  # what changes routings in validations
        self.validation_result: tuple[dict[str, float], dict[str, list]] = ({}, {})

    def task_scalars(self, task: float) -> dict[str, float]:
        """Other names of a training step's task loss, in the units of the task."""
        return {}

    def validation_scores(self) -> Scores:
        """Scores of a validation, with nothing added yet."""
        raise TypeError(f"{type(self).__name__} does not define validation_scores")

    def example(self, length: int) -> Batch:
        """Two sequences of token numbers 0 and 1, to rehearse with."""
        ids = torch.arange(2 * length).view(2, length) % 2
        return {"input_ids": ids, "labels": ids, "domain": torch.zeros_like(ids[:, 0])}

    # -- one optimizer step ---------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Takes one optimizer step; returns its loss and, when due, scalars and distributions."""
        step, due = self.global_step, (self.global_step + 1) % self.log_every == 0
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.schedules.apply(self._progress(step))
        parts = split_batch(batch, self.micro_batches)
        contexts = [self.context(part, step, i) for i, part in enumerate(parts)]
        terms, sums, states = self.add_gradient(parts, contexts, due)
        norm = self._clip()
        attempt = Attempt(step, terms["loss"], norm, parts, contexts)
        plain = getattr(optimizer, "optimizer", optimizer)  # lightning wraps it
        if self._steps.watch(attempt, plain) or due:
            self.check_finite()
        scheduler: Any = self.lr_schedulers()
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        update_routers(self._routers(), states)
        result: dict[str, Any] = {"loss": terms["loss"], "due": due}
        if due:
            read = self.losses.read(terms)
            task = read["task"]
            scalars = {"train/loss": task, "train/total_loss": read["loss"]}
            scalars |= self.task_scalars(task)
            scalars |= {"train/learning_rate": lr, "train/grad_norm": float(norm)}
            scalars |= {key: read[key] for key in read if key.startswith(("loss/", "policy/"))}
            scalars |= self.losses.probes(self._layers())
            routing, result["distributions"] = flatten(sums.values(all_reduce), "router")
            result["scalars"] = scalars | routing
        return result

    def check_finite(self) -> None:
        """Raises `NonFiniteLossError` if a step since the last look was not finite; neither that
        step nor any later one was taken. Looks at each step on the CPU, at due ones elsewhere.
        """
        for attempt, loss, norm in self._steps.not_finite():
            passes = flat(self._pieces(attempt.parts, attempt.contexts))
            raise NonFiniteLossError(
                f"step {attempt.step + 1}: loss {loss}, gradient norm {norm}; "
                f"{blame(self.run, passes)}. The step was not taken."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """No step that is not finite gets into a checkpoint."""
        self.check_finite()

    def context(self, batch: Batch, step: int, part: int) -> RoutingContext:
        """What routers may know of a micro-batch."""
        batch_size, length = batch["input_ids"].shape
        valid, prompt = batch.get("valid"), batch.get("prompt")
        return RoutingContext(
            batch_size=batch_size,
            sequence_length=length,
            valid=None if valid is None else valid.reshape(-1),
            prompt=None if prompt is None else prompt.reshape(-1),
            domain_ids=batch.get("domain"),
            num_domains=len(self.domains),
            task_ids=batch.get("task"),
            sample_ids=batch.get("sample"),
            progress=self._progress(step),
            seed=stable_seed(self.seed, step, part, rank()),
            step_seed=stable_seed(self.seed, step),
        )

    def _progress(self, step: int) -> float:
        """The share of training that is done after ``step`` steps."""
        max_steps = self.trainer.max_steps if self._trainer is not None else 0
        return min(1.0, step / max_steps) if max_steps > 0 else 0.0

    @property
    def _steps_taken(self) -> int:
        return self.global_step if self.loaded_step is None else self.loaded_step

    # -- validation -----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Starts the sums over the validation set, with routers as the steps taken leave them."""
        self.check_finite()
        self.schedules.apply(self._progress(self._steps_taken))
        self._scores = self.validation_scores()
        self._val_sums = DiagnosticSums(self.diagnostics)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the sums: nothing is averaged before the end."""
        context = self.context(batch, self._steps_taken, batch_idx)
        with rerouting(self.test_time, self.backbone, batch, context):
            out = self.run(batch, context)
        losses = self.task_loss(out.logits, batch)
        self._scores.add(batch, out.logits, losses, self.num_targets(batch))
        self._val_sums.add(out.router_outputs, context)

    def on_validation_epoch_end(self) -> None:
        """Reduces over ranks, then takes means: `validation_result` holds what came out."""
        scalars = self._scores.values()
        routing, distributions = flatten(self._val_sums.values(all_reduce), "val/router")
        self.validation_result = (scalars | routing, distributions)

    # -- Lightning ------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Splits the model over the processes, once, for strategies that have a mesh of them."""
        if self._device_mesh is not None and not isinstance(self.backbone, FSDPModule):
            backbone: Any = self.backbone
            dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            shard(backbone, self._device_mesh["data_parallel"], dtype)

    def why_not_shardable(self) -> str | None:
        """What keeps `configure_model` from splitting this model; None if nothing does."""
        return why_not_shardable(self.backbone)

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule over ``trainer.max_steps``."""
        optimizer, scheduler = self.recipe.build(self, self.trainer.max_steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _clip(self) -> Tensor:
        limit = math.inf if self.gradient_clip_norm is None else self.gradient_clip_norm
        policy = {id(parameter) for parameter in self.policy}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in policy]
        norms = [_clip(group, limit) for group in (self.policy, rest) if group]
        return torch.stack(norms).norm()


def _clip(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """The norm of their gradients, which it then bounds; they may be split over processes."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in (p for p in parameters if p.grad is not None):
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    grads = [[p.grad for p in part if p.grad is not None] for part in by_mesh.values()]
    norms = [whole(nn.utils.get_total_norm(part)) for part in grads]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for part in by_mesh.values():
        nn.utils.clip_grads_with_norm_(part, limit, norm)
    return norm
