"""What `routerlab train` is measured against: bare loops, which take turns with it."""

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from routerlab.backbones.decoder import Decoder
from routerlab.bench.timing import MIN_ROUNDS, Sample, Stopwatch
from routerlab.objectives.optimizer import OptimizerRecipe
from routerlab.objectives.routed import RoutedObjective
from routerlab.objectives.step import Batch

Loss = Callable[[Any, Batch], Tensor]

OURS, BARE, TRANSFORMERS = "routerlab train", "bare loop", "transformers"


class Loop:
    """The training loop that everyone writes: no trainer, no callbacks, nothing logged."""

    def __init__(
        self, model: nn.Module, loss: Loss, recipe: OptimizerRecipe, steps: int, clip: float
    ) -> None:
        self.model, self.loss, self.clip = model, loss, clip
        self.optimizer, self.scheduler = recipe.build(model, steps)

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        self.loss(self.model, batch).backward()
        clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.scheduler.step()


def bare_loss(weights: Mapping[str, float]) -> Loss:
    """Cross-entropy of a decoder, plus the plain formulas of the load-balancing and the z-loss
    (`losses.load_balancing`, `losses.router_z`) of one micro-batch, times ``weights``.
    """

    def loss(model: Decoder, batch: Batch) -> Tensor:
        out = model(batch["input_ids"])
        total = F.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten())
        for record in out.router_outputs.values():
            counts = torch.bincount(record.expert_indices, minlength=record.num_experts)
            shares = counts / counts.sum()
            balance = record.num_experts * (shares * record.router_probs.mean(0)).sum()
            z = record.router_logits.logsumexp(-1).square().mean()
            layer = weights["load_balancing"] * balance + weights["router_z"] * z
            total = total + layer / len(out.router_outputs)
        return total

    return loss


def transformers_loss(weight: float) -> Loss:
    """Cross-entropy of a model of transformers, plus its own auxiliary loss times ``weight``."""

    def loss(model: Any, batch: Batch) -> Tensor:
        out = model(batch["input_ids"], use_cache=False, output_router_logits=True)
        task = F.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten())
        return task + weight * out.aux_loss

    return loss


def transformers_model(decoder: Decoder) -> nn.Module:
    """Qwen3-MoE with the sizes of a decoder that has a MoE in each layer, and weights of its own;
    its experts run by ``grouped_mm``.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    block: Any = decoder.layers[0]
    num_experts, d_model, d_ff = block.moe.experts.down_proj.shape
    attention = block.self_attn
    options: dict[str, Any] = {
        "head_dim": attention.head_dim,
        "experts_implementation": "grouped_mm",
    }
    config = Qwen3MoeConfig(
        vocab_size=decoder.vocab_size,
        hidden_size=d_model,
        intermediate_size=d_ff,
        moe_intermediate_size=d_ff,
        num_hidden_layers=len(decoder.layers),
        num_attention_heads=attention.q_proj.out_features // attention.head_dim,
        num_key_value_heads=attention.k_proj.out_features // attention.head_dim,
        num_experts=num_experts,
        num_experts_per_tok=block.moe.router.top_k,
        norm_topk_prob=True,
        max_position_embeddings=decoder.max_positions,
        **options,
    )
    model: Any = Qwen3MoeForCausalLM(config)
    return model.to(decoder.lm_head.weight.device)


class Rivals(pl.Callback):
    """Lets bare loops take turns with the training that it is a callback of.

    A turn is one log interval. Between two turns of the training comes one of the bare loop over
    the same model, one of transformers and again one of the bare loop, on the batches of the turn
    before. What lies between the rivals' turns is the training's own: loading, callbacks, logging.

    Args:
        file: gets the samples of each contestant, every one between two of the bare loop.
        seconds: for each contestant.
        cpu_clock: counts CPU time.
    """

    def __init__(self, file: str, seconds: float, cpu_clock: bool = False) -> None:
        self.file, self.seconds = Path(file), seconds
        self._clock = time.process_time if cpu_clock else time.perf_counter
        self._batches: list[Batch] = []
        self._around: dict[str, list[list[Sample]]] = {OURS: [], TRANSFORMERS: []}
        self._last: Sample | None = None  # of the bare loop

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Builds the rivals."""
        assert isinstance(pl_module, RoutedObjective)
        weights = {name: loss.weight for name, loss in pl_module.losses.by_name.items()}
        decoder: Any = pl_module.backbone
        rest: Any = (pl_module.recipe, trainer.max_steps, pl_module.gradient_clip_norm)
        self.loops = {
            BARE: Loop(copy.deepcopy(decoder), bare_loss(weights), *rest),
            TRANSFORMERS: Loop(
                transformers_model(decoder), transformers_loss(weights["load_balancing"]), *rest
            ),
        }
        self._stopwatch = Stopwatch(pl_module.device, self._clock)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """At the end of a turn, gives the others theirs."""
        self._batches.append(batch)
        if not outputs["due"]:
            return
        ours = self._stopwatch.stop()
        before, theirs, after = map(self._turn, (BARE, TRANSFORMERS, BARE))
        self._batches.clear()
        rounds = self._around[OURS]
        if self._last is None:  # the first turns only warm up
            self._end = self._clock() + self.seconds * len(self._around)
        else:
            rounds.append([self._last, ours, before])
            self._around[TRANSFORMERS].append([before, theirs, after])
        self._last = after
        if len(rounds) >= MIN_ROUNDS and self._clock() >= self._end:
            found = {name: [[asdict(s) for s in t] for t in a] for name, a in self._around.items()}
            self.file.write_text(json.dumps(found))
            trainer.should_stop = True
        self._stopwatch.start()

    def _turn(self, name: str) -> Sample:
        self._stopwatch.start()
        for batch in self._batches:
            self.loops[name].step(batch)
        return self._stopwatch.stop()
