"""What fine-tuning is timed with: batches, and a model that takes training steps on them."""

from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from routerlab.adapters.state import RoutingState
from routerlab.bench.adapter_sizes import AdapterSizes
from routerlab.bench.moe_sizes import MoeSizes
from routerlab.core.instantiate import build, build_all
from routerlab.objectives.finetune import FineTune
from routerlab.objectives.step import Batch

NUM_TASKS = 4


class Batches:
    """Batches of prompts and answers, padded on the left; rows are three quarters full or more,
    and the answer is what lies in the last quarter.
    """

    def __init__(self, sizes: AdapterSizes | MoeSizes, device: torch.device, seed: int) -> None:
        self.sizes, self.device = sizes, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self.draws, self.batch = 0, {}
        self.draw()

    def draw(self) -> None:
        """A new batch, and so a new routing."""
        rows, length = self.sizes.batch_size, self.sizes.sequence_length
        draw = partial(torch.randint, generator=self._generator, device=self.device)
        tokens = draw(0, self.sizes.vocab_size, (rows, length + 1))
        place = torch.arange(length, device=self.device)
        valid = place >= draw(0, length // 4 + 1, (rows, 1))
        prompt = (place < length - length // 4) & valid
        tasks = torch.arange(rows, device=self.device) % NUM_TASKS
        self.draws += 1
        self.batch: Batch = {
            "input_ids": tokens[:, :-1],
            "labels": tokens[:, 1:].masked_fill(prompt | ~valid, -100),
            "valid": valid,
            "prompt": prompt,
            "task": tasks,
            "domain": tasks,
        }


class Contestant:
    """A model and its training steps: gradients as the fine-tuning objective takes them, then the
    optimizer; clipping, logging and schedules left out.

    ``cfg`` has the objective, the optimizer and the losses, which ``losses=False`` leaves out;
    ``knobs`` are the objective's.
    """

    def __init__(
        self,
        backbone: nn.Module,
        batches: Batches,
        cfg: DictConfig,
        losses: bool = True,
        **knobs: Any,
    ) -> None:
        made = build(
            cfg.objective,
            backbone=backbone.to(batches.device),
            optimizer=build(cfg.optimizer),
            losses=build_all(cfg.get("loss")) if losses else {},
            diagnostics={},
            domains=[str(task) for task in range(NUM_TASKS)],
            **knobs,
        )
        assert isinstance(made, FineTune)
        self.objective, self.batches = made, batches
        self.optimizer = made.recipe.build(made, 1000)[0]
        made.train()

    @property
    def backbone(self) -> Any:
        """The model."""
        return self.objective.backbone

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of the model, frozen ones too."""
        return list(self.objective.parameters())

    @property
    def trainable(self) -> int:
        """Number of parameters that learn."""
        return sum(p.numel() for p in self.parameters if p.requires_grad)

    def step(self) -> object:
        """One training step on the batch that was drawn last."""
        batch, objective = self.batches.batch, self.objective
        self.optimizer.zero_grad()
        context = objective.context(batch, self.batches.draws, 0)
        terms, _, _ = objective.accumulate([batch], [context], due=False)
        self.optimizer.step()
        return terms

    def forget(self) -> None:
        """Lets go of what the last step left: gradients and records."""
        self.optimizer.zero_grad()
        for part in (self.backbone, self.backbone.model.base_model):  # where a model keeps records
            state = getattr(part, "_state", getattr(part, "state", None))
            if isinstance(state, RoutingState):
                state.records = {}

    @torch.no_grad()
    def run(self) -> Tensor:
        """The logits of the batch, in the mode that the model is in."""
        batch = self.batches.batch
        context = self.objective.context(batch, self.batches.draws, 0)
        return self.objective.run(batch, context).logits

    @torch.no_grad()
    def picks(self) -> float:
        """Experts that a real token uses, on average over layers."""
        batch = self.batches.batch
        context = self.objective.context(batch, self.batches.draws, 0)
        records = self.objective.run(batch, context).router_outputs.values()
        found = sum(len(record.token_indices) for record in records)
        return found / max(1, len(records) * int(batch["valid"].sum()))
