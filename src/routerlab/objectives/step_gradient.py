"""The gradient of one optimizer step: micro-batches, samples, ranks, auxiliary losses."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from routerlab.backbones.decoder import BackboneOutput
from routerlab.core.protocols import Diagnostic
from routerlab.core.routing import RoutingContext
from routerlab.diagnostics.collection import DiagnosticSums
from routerlab.objectives import sampling
from routerlab.objectives.auxiliary import AuxiliaryLosses
from routerlab.objectives.policy_signal import PolicySignal
from routerlab.objectives.router_state import state_sums
from routerlab.objectives.sample_forms import Pass, cut, flat
from routerlab.objectives.step import (
    Batch,
    Records,
    Sums,
    add_up,
    all_reduce,
    step_totals,
    sum_of,
    sum_over_step,
    world_size,
)


class StepGradient(pl.LightningModule):
    """Runs a model on the micro-batches of a step and adds the gradient up: `accumulate`.

    `RoutedObjective` says what its attributes mean; a task defines `task_loss`.
    """

    backbone: nn.Module
    losses: AuxiliaryLosses
    diagnostics: Mapping[str, Diagnostic]
    policy: list[Tensor]  # parameters of routers that sample
    num_samples: int
    sample_form: str
    credit: str

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss [B, S] of each position in nats; positions without a target hold 0."""
        raise TypeError(f"{type(self).__name__} does not define task_loss")

    def num_targets(self, batch: Batch) -> Tensor:
        """Number of positions of ``batch`` that have a target, [B]."""
        return (batch["labels"] != -100).sum(1)

    def run(self, batch: Batch, context: RoutingContext) -> BackboneOutput:
        """Logits and records of a batch: the only call of the backbone."""
        return self.backbone(batch["input_ids"], context)

    def accumulate(
        self, parts: list[Batch], contexts: list[RoutingContext], due: bool
    ) -> tuple[dict[str, float], DiagnosticSums, list[Sums]]:
        """`add_gradient`, with the loss terms read from the device."""
        terms, sums, states = self.add_gradient(parts, contexts, due)
        return self.losses.read(terms), sums, states

    def add_gradient(
        self, parts: list[Batch], contexts: list[RoutingContext], due: bool
    ) -> tuple[dict[str, Tensor], DiagnosticSums, list[Sums]]:
        """Adds the gradient of the step to the parameters; returns the step's loss terms (equal on
        all ranks, and means over samples), when ``due`` the diagnostic sums of this rank, and what
        the passes have to say to routers that keep state.
        """
        pieces = self._pieces(parts, contexts)
        every = flat(pieces)
        targets = torch.stack([self.num_targets(one.batch).sum() for one in every]).sum()
        totals, num_targets = step_totals([one.context for one in every], targets)
        step_sums = self.count_step(pieces)
        sums, states, terms = DiagnosticSums(self.diagnostics if due else {}), [], {}
        signal = PolicySignal(self.policy, len(parts)) if due and self.policy else None
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            token_losses, records = self._run_passes(piece, num_targets)
            ran = [(found, one.context) for found, one in zip(records, piece, strict=True)]
            if step_sums is None:  # one micro-batch: its own records tell
                step_sums = sum_over_step([self.losses.step_sums(*one) for one in ran])
            shares = add_up([self.losses.shares(*one, totals, step_sums) for one in ran])
            if index == 0:
                shares |= self.losses.weight_shares(self._layers(), piece[0].context)
            task = piece[-1].task_weight * token_losses[-1].sum() / num_targets
            gradient_of = self.losses.weigh({"task": task} | shares)
            if self.policy:
                gradient_of = gradient_of + self._surrogate(
                    parts[index], token_losses, records, num_targets, signal, last
                )
            with self._sync(last=last):
                # DDP averages gradients over ranks; shares are to be summed
                self._backward(gradient_of * world_size())
            for found, context in ran:
                sums.add(found, context)
                states.append(state_sums(found))
            shares["task"] = sum_of([loss.detach().sum() for loss in token_losses]) / num_targets
            shares["loss"] = self.losses.weigh(shares)
            for key, share in shares.items():
                terms[key] = terms.get(key, 0.0) + share.detach()
        values = all_reduce(torch.stack(list(terms.values())))
        terms = dict(zip(terms, values.unbind(), strict=True))
        if signal is not None:
            found = signal.values().items()
            terms |= {key: values.new_tensor(value, dtype=torch.float64) for key, value in found}
        return terms, sums, states

    def _pieces(self, parts: list[Batch], contexts: list[RoutingContext]) -> list[list[Pass]]:
        """The passes of each micro-batch."""
        both = zip(parts, contexts, strict=True)
        return [cut(self.sample_form, part, context, self.num_samples) for part, context in both]

    def _run_passes(
        self, piece: list[Pass], num_targets: Tensor
    ) -> tuple[list[Tensor], list[Records]]:
        """Token losses and records of each pass. Only the last keeps the graph of its task loss:
        earlier ones have no gradient, or take it at once. What their routers learn from stays.
        """
        losses, records = [], []
        for one in piece:
            with nullcontext() if one.learns else torch.no_grad():
                out = self.run(one.batch, one.context)
                loss = self.task_loss(out.logits, one.batch)
            if not one.learns:
                torch.clear_autocast_cache()  # its casts were made without gradients
            elif one is not piece[-1]:
                if loss.requires_grad:  # not where routers alone learn
                    with self._sync(last=False):
                        self._backward(one.task_weight * loss.sum() / num_targets * world_size())
                loss = loss.detach()
            losses.append(loss)
            records.append(out.router_outputs)
        return losses, records

    def _surrogate(
        self,
        part: Batch,
        token_losses: list[Tensor],
        records: list[Records],
        num_targets: Tensor,
        signal: PolicySignal | None,
        last: bool,
    ) -> Tensor:
        """What routers that sample learn from: of one micro-batch, which ``signal`` watches."""
        samples = sampling.Samples.of(token_losses, records, self.num_targets(part))
        surrogates = samples.surrogates(num_targets, self.credit)
        if signal is not None:
            signal.add(samples)
        if signal is not None and last:
            signal.measure(surrogates)
        return surrogates.sum()

    @torch.no_grad()
    def count_step(self, pieces: list[list[Pass]]) -> Sums | None:
        """Sums of the whole step that losses ask for, by a forward pass without gradients; None
        where the records of the only micro-batch will tell, empty where no loss asks.
        """
        if not self.losses.need_step_sums:
            return {}
        if len(pieces) == 1:
            return None
        counted = []
        for one in flat(pieces):
            records = self.run(one.batch, one.context).router_outputs
            counted.append(self.losses.step_sums(records, one.context))
        torch.clear_autocast_cache()  # its casts were made without gradients
        return sum_over_step(counted)

    def precision(self) -> Any:
        """For passes outside of the trainer's steps: autocast, for whose dtype split experts are
        gathered.
        """
        if not isinstance(self.backbone, FSDPModule):
            return nullcontext()
        return self.trainer.precision_plugin.forward_context()

    def _layers(self) -> dict[str, Any]:
        """The MoE layers, by the names of their records; none if the backbone does not tell."""
        return getattr(self.backbone, "moe_layers", {})

    def _routers(self) -> dict[str, Any]:
        return {name: layer.router for name, layer in self._layers().items()}

    def _sync(self, last: bool) -> Any:
        """Ranks exchange gradients once a step, with the last micro-batch."""
        if isinstance(self.backbone, FSDPModule):
            self.backbone.set_requires_gradient_sync(last)
        strategy = None if self._trainer is None else self.trainer.strategy
        block = getattr(strategy, "block_backward_sync", None)
        return nullcontext() if last or block is None else block()

    def _backward(self, loss: Tensor) -> None:
        if self._trainer is None:
            loss.backward()
        else:
            self.manual_backward(loss)
