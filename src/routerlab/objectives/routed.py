"""One optimizer step of a routed model: micro-batches, ranks, auxiliary losses, diagnostics."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from routerlab.core.checks import choice
from routerlab.core.errors import NonFiniteLossError
from routerlab.core.protocols import AuxLoss, Diagnostic, LayerLoss, Schedule
from routerlab.core.routing import RoutingContext
from routerlab.core.seeding import stable_seed
from routerlab.diagnostics.collection import DiagnosticSums, flatten
from routerlab.objectives import sampling
from routerlab.objectives.auxiliary import AuxiliaryLosses
from routerlab.objectives.blame import blame
from routerlab.objectives.lookahead import worst_mark
from routerlab.objectives.optimizer import OptimizerRecipe
from routerlab.objectives.router_state import state_sums, update_routers
from routerlab.objectives.scheduled import Scheduled
from routerlab.objectives.step import (
    Batch,
    Sums,
    all_reduce,
    rank,
    split_batch,
    step_totals,
    sum_over_step,
    world_size,
)
from routerlab.objectives.validation import validation_scalars


class RoutedObjective(pl.LightningModule):
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

    A subclass says what the task is: `task_loss`.

    Args:
        backbone: ``(input_ids, context) -> BackboneOutput``.
        optimizer: optimizer and learning-rate schedule.
        losses, diagnostics, schedules: by name.
        seed: of the run; what a router draws depends on it, the step, micro-batch and rank.
        micro_batches: pieces into which a rank's batch is cut.
        gradient_clip_norm: largest norm of the gradient; null does not clip. The policy gradient of
            sampling routers is noisy, and clipped on its own.
        num_samples: runs of each sequence in a step; null: 2 if a router samples, else 1.
        credit: which losses a sampled choice answers for: ``sequence`` (all of its sequence's) or
            ``reward_to_go`` (those at its position and after).
        log_every: diagnostics are computed on every n-th step.
        domains: names of the labels in ``batch["domain"]``.
        bytes_per_token: of each domain, to report bits per byte (in training: of their mean).
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        losses: Mapping[str, AuxLoss | LayerLoss],
        diagnostics: Mapping[str, Diagnostic],
        schedules: Mapping[str, Schedule] | None = None,
        seed: int = 0,
        micro_batches: int = 1,
        gradient_clip_norm: float | None = 1.0,
        num_samples: int | None = None,
        credit: str = "sequence",
        log_every: int = 10,
        domains: list[str] | None = None,
        bytes_per_token: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        for name, value in (("micro_batches", micro_batches), ("log_every", log_every)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if gradient_clip_norm is not None and gradient_clip_norm <= 0:
            raise ValueError(f"gradient_clip_norm={gradient_clip_norm}: must be above 0, or null")
        if bytes_per_token and len(bytes_per_token) != len(domains or ["all"]):
            raise ValueError(f"bytes_per_token={bytes_per_token}: one for each of {domains}")
        self.backbone, self.recipe = backbone, optimizer
        self.losses, self.diagnostics = AuxiliaryLosses(losses), dict(diagnostics)
        self.schedules = Scheduled(schedules or {}, losses, list(self._routers().values()))
        self.looks_ahead = worst_mark(backbone, self.schedules)
        self.policy = sampling.policy_parameters(self._routers().values())
        self.num_samples = sampling.check_num_samples(num_samples, bool(self.policy))
        choice("credit", credit, ("sequence", "reward_to_go"))
        self.seed, self.micro_batches, self.log_every = seed, micro_batches, log_every
        self.credit = credit
        self.gradient_clip_norm = gradient_clip_norm
        self.domains = domains or ["all"]
        self.bytes_per_token = bytes_per_token or [1.0] * len(self.domains)
        self._bytes_per_token = sum(self.bytes_per_token) / len(self.bytes_per_token)
        self.loaded_step: int | None = None  # of a checkpoint that is only evaluated
        self.validation_result: tuple[dict[str, float], dict[str, list]] = ({}, {})

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss [B, S] of each position in nats; positions without a target hold 0."""
        raise TypeError(f"{type(self).__name__} does not define task_loss")

    def num_targets(self, batch: Batch) -> Tensor:
        """Number of positions of ``batch`` that have a target, [B]."""
        return (batch["labels"] != -100).sum(1)

    # -- one optimizer step ---------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Takes one optimizer step; returns its loss and, when due, scalars and distributions."""
        step, due = self.global_step, (self.global_step + 1) % self.log_every == 0
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.schedules.apply(self._progress(step))
        parts = split_batch(batch, self.micro_batches)
        parts = [sampling.repeat(part, self.num_samples) for part in parts]
        contexts = [self.context(part, step, i) for i, part in enumerate(parts)]
        terms, sums, states = self.accumulate(parts, contexts, due)
        norm = self._clip()
        if not (math.isfinite(terms["loss"]) and math.isfinite(norm)):
            raise NonFiniteLossError(
                f"step {step + 1}: loss {terms['loss']}, gradient norm {norm}; "
                f"{blame(self.backbone, parts, contexts)}. The step was not taken."
            )
        scheduler: Any = self.lr_schedulers()
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        update_routers(self._routers(), states)
        result: dict[str, Any] = {"loss": torch.tensor(terms["loss"]), "due": due}
        if due:
            task = terms["task"]
            scalars = {"train/loss": task, "train/total_loss": terms["loss"]}
            scalars["train/bits_per_byte"] = task / math.log(2) / self._bytes_per_token
            scalars |= {"train/learning_rate": lr, "train/grad_norm": norm}
            scalars |= {key: value for key, value in terms.items() if key.startswith("loss/")}
            scalars |= self.losses.probes(self._layers())
            routing, result["distributions"] = flatten(sums.values(all_reduce), "router")
            result["scalars"] = scalars | routing
        return result

    def accumulate(
        self, parts: list[Batch], contexts: list[RoutingContext], due: bool
    ) -> tuple[dict[str, float], DiagnosticSums, list[Sums]]:
        """Adds the gradient of the step to the parameters; returns the step's loss terms (equal on
        all ranks), when ``due`` the diagnostic sums of this rank, and what the micro-batches have
        to say to routers that keep state.
        """
        targets = torch.stack([self.num_targets(part).sum() for part in parts]).sum()
        totals, num_targets = step_totals(contexts, targets)
        step_sums = self.count_step(parts, contexts)
        sums, states, terms = DiagnosticSums(self.diagnostics if due else {}), [], {}
        for index, (part, context) in enumerate(zip(parts, contexts, strict=True)):
            out = self.backbone(part["input_ids"], context)
            if step_sums is None:  # one micro-batch: its own records tell
                step_sums = sum_over_step([self.losses.step_sums(out.router_outputs, context)])
            token_losses = self.task_loss(out.logits, part)
            shares = {"task": token_losses.sum() / num_targets}
            shares |= self.losses.shares(out.router_outputs, context, totals, step_sums)
            if index == 0:
                shares |= self.losses.weight_shares(self._layers(), context)
            shares["loss"] = self.losses.weigh(shares)
            gradient_of = shares["loss"]
            if self.policy:
                gradient_of = gradient_of + sampling.surrogate(
                    token_losses,
                    self.num_targets(part),
                    num_targets,
                    out.router_outputs,
                    self.num_samples,
                    self.credit,
                )
            with self._sync(last=index == len(parts) - 1):
                # DDP averages gradients over ranks; shares are to be summed
                self._backward(gradient_of * world_size())
            sums.add(out.router_outputs, context)
            states.append(state_sums(out.router_outputs))
            for key, share in shares.items():
                terms[key] = terms.get(key, 0.0) + share.detach()
        values = all_reduce(torch.stack(list(terms.values()))).tolist()
        terms = dict(zip(terms, values, strict=True))
        for name, loss in self.losses.by_name.items():
            terms[f"loss/{name}/weighted"] = terms[f"loss/{name}"] * loss.weight
        return terms, sums, states

    @torch.no_grad()
    def count_step(self, parts: list[Batch], contexts: list[RoutingContext]) -> Sums | None:
        """Sums of the whole step that losses ask for, by a forward pass without gradients; None
        where the records of the only micro-batch will tell, empty where no loss asks.
        """
        if not self.losses.need_step_sums:
            return {}
        if len(parts) == 1:
            return None
        sums = sum_over_step(
            [
                self.losses.step_sums(self.backbone(p["input_ids"], c).router_outputs, c)
                for p, c in zip(parts, contexts, strict=True)
            ]
        )
        torch.clear_autocast_cache()  # its casts were made without gradients
        return sums

    def context(self, batch: Batch, step: int, part: int) -> RoutingContext:
        """What routers may know of a micro-batch."""
        batch_size, length = batch["input_ids"].shape
        valid = batch.get("valid")
        return RoutingContext(
            batch_size=batch_size,
            sequence_length=length,
            valid=None if valid is None else valid.reshape(-1),
            domain_ids=batch.get("domain"),
            num_domains=len(self.domains),
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

    def _layers(self) -> dict[str, Any]:
        """The MoE layers, by the names of their records; none if the backbone does not tell."""
        return getattr(self.backbone, "moe_layers", {})

    def _routers(self) -> dict[str, Any]:
        return {name: layer.router for name, layer in self._layers().items()}

    # -- validation -----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Starts the sums over the validation set, with routers as the steps taken leave them."""
        self.schedules.apply(self._progress(self._steps_taken))
        self._val_loss = torch.zeros(len(self.domains), 2, dtype=torch.float64, device=self.device)
        self._val_sums = DiagnosticSums(self.diagnostics)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the sums: nothing is averaged before the end."""
        context = self.context(batch, self._steps_taken, batch_idx)
        out = self.backbone(batch["input_ids"], context)
        losses = self.task_loss(out.logits, batch).double().sum(1)
        rows = torch.stack([losses, self.num_targets(batch).double()], dim=1)
        domain = batch.get("domain", torch.zeros_like(batch["input_ids"][:, 0]))
        self._val_loss.index_add_(0, domain, rows)
        self._val_sums.add(out.router_outputs, context)

    def on_validation_epoch_end(self) -> None:
        """Reduces over ranks, then takes means: `validation_result` holds what came out."""
        sums = all_reduce(self._val_loss)
        scalars = validation_scalars(sums, self.domains, self.bytes_per_token)
        routing, distributions = flatten(self._val_sums.values(all_reduce), "val/router")
        self.validation_result = (scalars | routing, distributions)

    # -- Lightning ------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule over ``trainer.max_steps``."""
        optimizer, scheduler = self.recipe.build(self, self.trainer.max_steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _sync(self, last: bool) -> Any:
        """Ranks exchange gradients once a step, with the last micro-batch."""
        strategy = None if self._trainer is None else self.trainer.strategy
        block = getattr(strategy, "block_backward_sync", None)
        return nullcontext() if last or block is None else block()

    def _backward(self, loss: Tensor) -> None:
        if self._trainer is None:
            loss.backward()
        else:
            self.manual_backward(loss)

    def _clip(self) -> float:
        limit = math.inf if self.gradient_clip_norm is None else self.gradient_clip_norm
        policy = {id(parameter) for parameter in self.policy}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in policy]
        norms = [nn.utils.clip_grad_norm_(group, limit) for group in (self.policy, rest) if group]
        return float(torch.stack(norms).norm())
