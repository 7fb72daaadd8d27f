"""What tuning the routers of a model of transformers costs, next to full fine-tuning."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich import box
from rich.table import Table

from routerlab.analysis.neighbour_bank import NeighbourBank
from routerlab.backbones.hugging_face import HuggingFaceMoE
from routerlab.bench.fine_tuning import Batches, Contestant
from routerlab.bench.layer import Settings
from routerlab.bench.memory import live_saved_mib, peak_mib
from routerlab.bench.moe_sizes import MoeSizes
from routerlab.bench.report import dropped, environment, number
from routerlab.bench.timing import Ratio, interleave
from routerlab.core.checks import within
from routerlab.core.config import compose
from routerlab.objectives.routing_alignment import RoutingAlignment

NUM_SAMPLES = 512  # of the bank
GOAL = 1.1  # times the step of the same routers without alignment
FULL, FORWARD = "full fine-tuning", "forward pass"
PARTS = {
    "step": "training step, x full fine-tuning",
    "alignment": "the same with manifold alignment, x without",
}
_ALIGNMENT = "manifold_alignment"
_COLUMNS = (
    *("", "x", "quartiles", "ms", "trained", "layers"),
    *("peak\nMiB", "saved\nMiB", "goal", "met"),
)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TuningRow:
    """One way to tune a model: its time over that of the baseline of its ``part`` (`PARTS`).

    ``trainable``: how many parameters learn; ``layers``: how many routed layers autograd goes
    through; ``saved_mib``: what it keeps for backward (`bench.memory.live_saved_mib`).
    """

    part: str
    name: str
    trainable: int
    layers: int
    peak_mib: float
    saved_mib: float
    ratio: float = 1.0
    lower: float | None = None
    upper: float | None = None
    milliseconds: float | None = None
    samples: int | None = None
    busy: int | None = None
    goal: float | None = None
    met: bool | None = None

    def timed(self, found: Ratio) -> "TuningRow":
        """The row with the figures of a ratio to its baseline."""
        return replace(
            self,
            ratio=found.median,
            lower=found.lower,
            upper=found.upper,
            milliseconds=found.milliseconds,
            samples=found.samples,
            busy=found.busy,
            met=None if self.goal is None else found.median <= self.goal,
        )


def bench_tuning(
    sizes: MoeSizes,
    last_layers: int,
    settings: Settings,
    progress: Progress = lambda text: None,
) -> list[TuningRow]:
    """A row each for steps that train all parameters, all routers, those of the last
    ``last_layers`` without and with alignment and that of the last one, and for a forward pass;
    then one for what alignment adds.
    """
    within("last_layers", last_layers, 1, sizes.num_layers)
    torch.manual_seed(settings.seed)
    batches = SampleBatches(sizes, settings.device, settings.seed)
    full = build(sizes, batches, None)
    some = build(sizes, batches, last_layers)
    aligned = build(sizes, batches, last_layers, on=some)
    tuned = {routers_of(n): build(sizes, batches, n) for n in {1, sizes.num_layers} - {last_layers}}
    tuned |= {routers_of(last_layers): some, f"{routers_of(last_layers)}, aligned": aligned}
    order = sorted(tuned, key=lambda name: (-layers_in_graph(tuned[name]), name))
    works = {name: tuned[name].step for name in order}

    def measure(part: str, name: str, contestant: Contestant, goal: float | None) -> TuningRow:
        work = contestant.run if name == FORWARD else contestant.step
        contestant.forget()  # gradients are then part of what the step holds
        return TuningRow(
            part,
            name,
            trainable=0 if name == FORWARD else contestant.trainable,
            layers=0 if name == FORWARD else layers_in_graph(contestant),
            peak_mib=peak_mib(work, settings.device),
            saved_mib=live_saved_mib(work, contestant.parameters),
            goal=goal,
        )

    def race(
        works: dict[str, Callable[[], object]], baseline: Callable[[], object]
    ) -> tuple[dict[str, Ratio], float]:
        progress(f"timing {', '.join(works)}")
        s = settings
        return interleave(works, baseline, batches.draw, s.seconds, s.device, s.clock)

    timed, milliseconds = race(works | {FORWARD: some.run}, full.step)
    progress("memory")
    rows = [replace(measure("step", FULL, full, None), milliseconds=milliseconds)]
    rows += [measure("step", n, tuned.get(n, some), None).timed(r) for n, r in timed.items()]
    name = routers_of(last_layers)
    found = race({name: aligned.step}, some.step)[0][name]
    return [*rows, measure("alignment", name, aligned, GOAL).timed(found)]
