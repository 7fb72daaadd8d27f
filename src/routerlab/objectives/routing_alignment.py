"""Routers alone are fine-tuned, and questions alike are routed alike."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from routerlab.analysis.neighbour_bank import NeighbourBank, gather_samples, weights_digest
from routerlab.core.checks import within
from routerlab.core.layers import pick_layers
from routerlab.losses.manifold_alignment import ManifoldAlignment
from routerlab.losses.routing_vector_penalty import RoutingVectorPenalty
from routerlab.objectives.finetune import FineTune
from routerlab.objectives.step import Batch
from routerlab.ops.routing_vectors import routing_vectors


class RoutingAlignment(FineTune):
    r"""Post-training of routers (RoMA, Li et al., arXiv 2511.07419): everything is frozen but the
    routers of some layers (``backbone.trainable=routers``), which learn the task (`FineTune`) and,
    where there is a `ManifoldAlignment` among the losses, to route samples as similar samples are
    routed that the model answered rightly before. Without one this is plain router tuning.

    That loss needs a bank of the training samples: `build_bank` before the first step (or
    `NeighbourBank.load` with `fingerprint`), then `use_bank`. Batches must hold ``sample`` [B],
    the number of each row among the training samples, -1 elsewhere.

    :math:`\lambda` warms up: in step t of T (from 0) the loss's weight is
    :math:`\lambda \min(1, (t + 1) / W)`, logged as ``loss/<name>/weight``; a schedule for that
    weight overrules it.

    Args:
        alignment_warmup: W as a share of T, rounded up; 0: no warm-up [reconstructed: the paper's
            code has 2000 steps, more than a small run].
        alignment_warmup_steps: W itself; overrules the share.
        same_layers: refuse losses on other layers' routing than the trained.

    Raises:
        ValueError: something other than routers learns, or no router does; a router samples its
            choice; a loss looks at layers that are not trained.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        alignment_warmup: int | float = 0.2,
        alignment_warmup_steps: int | None = None,
        same_layers: bool = True,
        **shared: Any,
    ) -> None:
        super().__init__(backbone, **shared)
        within("alignment_warmup", alignment_warmup, 0, 1)
        if alignment_warmup_steps is not None:
            within("alignment_warmup_steps", alignment_warmup_steps, 1)
        self.alignment_warmup = alignment_warmup
        self.alignment_warmup_steps = alignment_warmup_steps
        self.trained_layers = self._check_trained()
        readers = self._readers()
        for name, loss in readers.items() if same_layers else ():
            layers = pick_layers(list(self._layers()), loss.layers, f"loss.{name}.layers")
            if layers != self.trained_layers:
                raise ValueError(
                    f"loss.{name}.layers={loss.layers}: are {', '.join(layers)}, but routers learn "
                    f"in {', '.join(self.trained_layers)} (backbone.trainable_layers); if that is "
                    "meant, set objective.same_layers=false"
                )
        found = [name for name, loss in readers.items() if isinstance(loss, ManifoldAlignment)]
        if len(found) > 1:
            raise ValueError(f"loss=[{', '.join(found)}]: at most one may align routing")
        self.alignment: ManifoldAlignment | None = readers[found[0]] if found else None
        self._alignment_name = found[0] if found else ""
        self._full_weight = self.alignment.weight if self.alignment is not None else 0.0
        # What the bank is of: also without such a loss, whose effect can then be measured.
        first = self.alignment or next(iter(readers.values()), None)
        wanted = self.trained_layers
        if first is not None:
            wanted = pick_layers(list(self._layers()), first.layers, "layers")
        self.bank_token = "last1" if first is None else first.token
        self.bank_layers = {n: self._layers()[n].experts.num_experts for n in wanted}
        self.bank: NeighbourBank | None = None

    # -- the bank -------------------------------------------------------------------------------

    def why_not_shardable(self) -> str | None:
        """One process alone makes and measures the bank."""
        return "objective=routing_alignment measures its bank in one process"

    def fingerprint(self, data: Mapping[str, Any], embedder: Mapping[str, Any]) -> dict[str, Any]:
        """What a bank of this model depends on: the ``data`` and ``embedder`` as they identify
        themselves, all present weights of the model, layers and token.
        """
        return {
            "data": dict(data),
            "embedder": dict(embedder),
            "model": weights_digest(self.backbone),
            "layers": self.bank_layers,
            "token": self.bank_token,
            "right_by": self.option_score,
        }

    def build_bank(
        self,
        batches: Iterable[Batch],
        embeddings: Float[Tensor, "n m"],
        fingerprint: Mapping[str, Any],
    ) -> NeighbourBank:
        """A bank of the model as it is: ``batches`` hold each training sample once, of whose
        prompts row i of ``embeddings`` is that of sample i.
        """
        return NeighbourBank.build(
            self.observe,
            batches,
            embeddings,
            layers=self.bank_layers,
            token=self.bank_token,
            fingerprint=fingerprint,
        )

    def use_bank(self, bank: NeighbourBank) -> None:
        """Takes a bank: the loss that aligns, if there is one, gets its neighbours."""
        self.bank = bank
        if self.alignment is not None:
            self.alignment.use_bank(bank, self.seed)

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """How the model as it is routes the bank's samples, which ``batches`` hold once each.

        ``distance``: mean squared routing distance to the nearest neighbours (`Neighbourhood` as
        the paper has it, also where the loss has another); ``similarity``: linear CKA of embeddings
        and routing; ``load_entropy``: of the mean routing, in nats; ``accuracy`` on the samples.
        `measured` gives the same of the bank itself.

        Raises ValueError without a bank.
        """
        if self.bank is None:
            raise ValueError("bank: there is none; call use_bank first")
        routing, correct = gather_samples(self.observe, batches, len(self.bank.correct))
        return measured(self.bank, routing, correct)

    @torch.no_grad()
    def observe(self, batch: Batch) -> tuple[Float[Tensor, "B R"], Bool[Tensor, "B"]]:
        """Routing vectors of a batch of right answers, and which of them the model gives, as it
        does in evaluation.
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        batch = {key: value.to(self.device) for key, value in batch.items()}
        context = self.context(batch, 0, 0)
        out = self.run(batch, context)
        for module, mode in modes:
            module.training = mode
        found = routing_vectors(
            out.router_outputs, list(self.bank_layers), context, self.bank_token
        )
        return found, self.correct(out.logits, batch)

    # -- training -------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Takes one optimizer step with the weight that the warm-up gives it."""
        if self.alignment is not None:
            share = warm_up(self.global_step, self._warmup_steps())
            self.alignment.weight = self._full_weight * share
        result = super().training_step(batch, batch_idx)
        if result["due"] and self.alignment is not None:
            result["scalars"][f"loss/{self._alignment_name}/weight"] = self.alignment.weight
        return result

    def _warmup_steps(self) -> int:
        if self.alignment_warmup_steps is not None:
            return self.alignment_warmup_steps
        return max(1, math.ceil(self.alignment_warmup * max(0, self.trainer.max_steps)))

    def _readers(self) -> dict[str, Any]:
        """The losses that look at routing vectors."""
        kinds = (ManifoldAlignment, RoutingVectorPenalty)
        return {n: loss for n, loss in self.losses.by_name.items() if isinstance(loss, kinds)}

    def _check_trained(self) -> list[str]:
        """The layers whose routers learn, where nothing else does."""
        routers = self._routers()
        learning = {
            name: [p for p in router.parameters() if p.requires_grad]
            for name, router in routers.items()
        }
        inside = {id(p) for found in learning.values() for p in found}
        others = [
            name
            for name, p in self.backbone.named_parameters()
            if p.requires_grad and id(p) not in inside
        ]
        if others:
            raise ValueError(
                f"objective=routing_alignment: trains routers alone, but {others[0]} "
                f"({len(others)} tensors) would learn too; use backbone.trainable=routers"
            )
        if not inside:
            raise ValueError(
                "objective=routing_alignment: no router of this model learns; use "
                "backbone.trainable=routers on a model with routers that have weights"
            )
        if sampling := [n for n, router in routers.items() if getattr(router, "samples", False)]:
            raise ValueError(
                f"objective=routing_alignment: the router of {sampling[0]} samples its choice, "
                "which has no routing vector to align; use one that does not"
            )
        return [name for name, found in learning.items() if found]


def measured(
    bank: NeighbourBank,
    routing: Float[Tensor, "n R"] | None = None,
    correct: Bool[Tensor, "n"] | None = None,
) -> dict[str, float]:
    """What `RoutingAlignment.measure` tells, of the given routing (None: the bank's own)."""
    right = bank.correct if correct is None else correct
    return {
        "distance": bank.mean_distance(routing),
        "similarity": bank.similarity(routing),
        "load_entropy": bank.load_entropy(routing),
        "accuracy": float(right.double().mean()),
    }


def warm_up(step: int, steps: int) -> float:
    """The share of its weight that a loss has in optimizer step ``step`` (from 0)."""
    return min(1.0, (step + 1) / steps)
