"""Diagnostics of all layers, added up over micro-batches and ranks before any ratio is taken."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from routerlab.core.protocols import Diagnostic
from routerlab.core.routing import RouterOutput, RoutingContext

Values = dict[str, dict[str, Tensor]]  # layer -> name -> value
Sums = dict[tuple[str, str, str], Tensor]  # (layer, diagnostic, name) -> running sum


class DiagnosticSums:
    """Running sums of every diagnostic in every layer: ``add`` records, then ask for ``values``."""

    def __init__(self, diagnostics: Mapping[str, Diagnostic]) -> None:
        self.diagnostics = dict(diagnostics)
        self._sums: Sums = {}

    @torch.no_grad()
    def add(
        self,
        router_outputs: Mapping[str, RouterOutput],
        context: RoutingContext | None = None,
    ) -> None:
        """Add the records of one micro-batch. Without padding nothing waits for the device."""
        for layer, output in router_outputs.items():
            for name, diagnostic in self.diagnostics.items():
                for key, value in diagnostic.sums(output, context).items():
                    place = (layer, name, key)
                    value = value.detach().double()
                    self._sums[place] = self._sums[place] + value if place in self._sums else value

    def values(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> Values:
        """Values of the sums, in the order in which layers were added, on the host.

        ``all_reduce`` adds a tensor over ranks; it is called once, on all sums together.
        """
        if not self._sums:
            return {}
        flat = torch.cat([value.reshape(-1) for value in self._sums.values()])
        flat = (flat if all_reduce is None else all_reduce(flat)).cpu()
        parts = flat.split([value.numel() for value in self._sums.values()])
        by_layer: dict[str, dict[str, dict[str, Tensor]]] = {}
        for ((layer, name, key), value), part in zip(self._sums.items(), parts, strict=True):
            sums = by_layer.setdefault(layer, {}).setdefault(name, {})
            sums[key] = part.view(value.shape)
        return {
            layer: {
                metric: value
                for name, sums in by_name.items()
                for metric, value in self.diagnostics[name].values(sums).items()
            }
            for layer, by_name in by_layer.items()
        }


def flatten(values: Values, prefix: str) -> tuple[dict[str, float], dict[str, list]]:
    """Scalars and distributions under path-like keys: ``<prefix>/layers.03/load_entropy`` for each
    layer, ``<prefix>/mean/load_entropy`` for the mean over layers (scalars only).
    """
    scalars: dict[str, float] = {}
    distributions: dict[str, list] = {}
    by_metric: dict[str, list[float]] = {}
    for layer, metrics in values.items():
        place = f"{prefix}/{layer.removesuffix('.moe')}"
        for metric, value in metrics.items():
            if value.ndim:
                distributions[f"{place}/{metric}"] = value.tolist()
            else:
                scalars[f"{place}/{metric}"] = float(value)
                by_metric.setdefault(metric, []).append(float(value))
    means = {f"{prefix}/mean/{name}": sum(v) / len(v) for name, v in by_metric.items()}
    return means | scalars, distributions
