"""All auxiliary losses of a step: on records, micro-batch by micro-batch, and on weights, once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from routerlab.core.protocols import AuxLoss, LayerLoss, RecordsLoss
from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.objectives.pooling import POOLED, pooled
from routerlab.objectives.step import Records, Sums, world_size


class AuxiliaryLosses:
    """Losses by name. Each is computed layer by layer, then averaged over layers; one that says
    ``pool_layers`` is computed once, on all layers together, and a `RecordsLoss` sees the records
    of all layers.
    """

    def __init__(self, losses: Mapping[str, AuxLoss | LayerLoss | RecordsLoss]) -> None:
        self.by_name = dict(losses)
        self.of_records: dict[str, AuxLoss] = {}
        self.of_weights: dict[str, LayerLoss] = {}
        self.of_layers: dict[str, RecordsLoss] = {}
        for name, loss in losses.items():
            if isinstance(loss, LayerLoss):
                self.of_weights[name] = loss
            elif isinstance(loss, RecordsLoss):
                self.of_layers[name] = loss
            else:
                self.of_records[name] = loss

    @property
    def need_step_sums(self) -> bool:
        """Whether a loss must know sums of the whole step before the first backward pass."""
        return any(loss.needs_step_sums for loss in self.of_records.values())

    def step_sums(self, records: Records, context: RoutingContext) -> Sums:
        """Those sums, of one micro-batch."""
        views = self._views(records, context)
        return {
            (name, place): loss.step_sums(output, told).detach()  # type: ignore[attr-defined]
            for name, loss in self.of_records.items()
            if loss.needs_step_sums
            for place, output, told in views[_pools(loss)]
        }

    def shares(
        self, records: Records, context: RoutingContext, totals: StepTotals, step_sums: Sums
    ) -> dict[str, Tensor]:
        """This micro-batch's share of each loss on records."""
        views, values = self._views(records, context), {}
        for name, loss in self.of_records.items():
            size = len(records) if _pools(loss) else 1  # a pooled step has each token once a layer
            tokens, sequences = totals.num_tokens * size, totals.num_sequences * size
            found = [
                loss(output, told, StepTotals(tokens, sequences, step_sums.get((name, place))))
                for place, output, told in views[_pools(loss)]
            ]
            values[f"loss/{name}"] = torch.stack(found).mean()
        for name, loss in self.of_layers.items():
            values[f"loss/{name}"] = loss.of_records(records, context, totals)
        return values

    def _views(
        self, records: Records, context: RoutingContext
    ) -> dict[bool, list[tuple[str, RouterOutput, RoutingContext]]]:
        """What losses look at, with its name and context: single layers, and under True all layers
        together.
        """
        readers = [*self.of_records, *self.of_layers]
        if readers and not records:
            raise ValueError(
                f"loss {', '.join(readers)}: reads the records of routers, and this model "
                "has none; use loss=[]"
            )
        layers = [(n, out, context.at_layer(i)) for i, (n, out) in enumerate(records.items())]
        views = {False: layers, True: []}
        if any(_pools(loss) for loss in self.of_records.values()):
            views[True] = [(POOLED, *pooled(records, context))]
        return views

    def weight_shares(
        self, layers: Mapping[str, Any], context: RoutingContext
    ) -> dict[str, Tensor]:
        """This rank's share of each loss on weights; call it once a step."""
        values = {}
        for name, loss in self.of_weights.items():
            found = [
                loss.of_layer(layer, context.at_layer(i)) for i, layer in enumerate(layers.values())
            ]
            values[f"loss/{name}"] = torch.stack(found).mean() / world_size()
        return values

    def weigh(self, shares: Mapping[str, Tensor]) -> Tensor:
        """The task loss plus the weighted auxiliary losses."""
        total = shares["task"]
        for name, loss in self.by_name.items():
            if f"loss/{name}" in shares:
                total = total + loss.weight * shares[f"loss/{name}"]
        return total

    def read(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """The numbers of a step's loss terms, in one transfer from the device, and each auxiliary
        loss times its weight.
        """
        values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
        weighted = {
            f"loss/{name}/weighted": values[f"loss/{name}"] * loss.weight
            for name, loss in self.by_name.items()
        }
        return values | weighted

    def probes(self, layers: Mapping[str, Any]) -> dict[str, float]:
        """What losses on weights have to tell of the layers, as means over layers."""
        values = {}
        for name, loss in self.of_weights.items():
            if not hasattr(loss, "probe"):
                continue
            found = [loss.probe(layer) for layer in layers.values()]  # type: ignore[attr-defined]
            for key in found[0]:
                mean = torch.stack([values_of[key] for values_of in found]).mean()
                values[f"loss/{name}/{key}"] = float(mean)
        return values


def _pools(loss: AuxLoss) -> bool:
    """Whether a loss looks at all layers together."""
    return bool(getattr(loss, "pool_layers", False))
