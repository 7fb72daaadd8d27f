"""Where a step that is not finite went wrong."""

import math
from collections.abc import Callable, Sequence

import torch

from routerlab.backbones.decoder import BackboneOutput
from routerlab.core.routing import RoutingContext
from routerlab.objectives.sample_forms import Pass
from routerlab.objectives.step import Batch, all_reduce_max


@torch.no_grad()
def blame(run: Callable[[Batch, RoutingContext], BackboneOutput], passes: Sequence[Pass]) -> str:
    """Says which layer's router logits blew up: the forward passes once more, looking."""
    peaks: dict[str, float] = {}
    for one in passes:
        for layer, out in run(one.batch, one.context).router_outputs.items():
            logits = out.without_padding(out.router_logits)
            peak = logits.detach().abs().amax().item() if len(logits) else 0.0
            peaks[layer] = peak if math.isnan(peak) else max(peaks.get(layer, 0.0), peak)
    if not peaks:
        return "there are no routers; the model's own logits are not finite"
    device = passes[0].batch["input_ids"].device
    flat = torch.tensor(list(peaks.values()), dtype=torch.float64, device=device)
    flat = all_reduce_max(flat.nan_to_num(torch.inf, torch.inf)).tolist()
    peaks = dict(zip(peaks, flat, strict=True))
    if bad := [layer for layer, peak in peaks.items() if not math.isfinite(peak)]:
        return f"the router logits of {bad[0]} are the first that are not finite"
    largest = max(peaks, key=lambda layer: peaks[layer])
    return f"all router logits are finite, the largest ({peaks[largest]:.3g}) in {largest}"
