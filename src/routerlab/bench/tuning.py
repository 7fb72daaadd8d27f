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
_COLUMNS = ("", "x", "quartiles", "ms", "layers", "peak\nMiB", "saved\nMiB", "goal", "met")

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
    """A row each for steps that train everything, all routers, those of the last ``last_layers``
    without and with alignment and that of the last one, and for a forward pass; then one for what
    alignment adds.
    """
    within("last_layers", last_layers, 1, sizes.num_layers)
    torch.manual_seed(settings.seed)
    batches = SampleBatches(sizes, settings.device, settings.seed)
    ways = all_ways(sizes, last_layers, batches)

    def race(part: str, names: list[str], baseline: str) -> tuple[list[TuningRow], float]:
        progress(f"timing {', '.join(names)}")
        timed, milliseconds = interleave(
            {name: ways[name].work for name in names},
            ways[baseline].work,
            batches.draw,
            settings.seconds,
            settings.device,
            settings.clock,
        )
        goal = GOAL if part == "alignment" else None
        rows = [ways[n].row(part, n, goal).timed(found) for n, found in timed.items()]
        return rows, milliseconds

    rows, milliseconds = race("step", [name for name in ways if name != FULL], FULL)
    full = replace(ways[FULL].row("step", FULL), milliseconds=milliseconds)
    plain = routers_of(last_layers, sizes)
    added, _ = race("alignment", [f"{plain}, aligned"], plain)
    return [full, *rows, *added]


@dataclass(frozen=True, slots=True)
class Way:
    """A contestant that takes training steps or, if it does not learn, runs forward."""

    contestant: Contestant
    learns: bool = True

    def work(self) -> object:
        """A step or a pass."""
        return self.contestant.step() if self.learns else self.contestant.run()

    def layers(self) -> int:
        """Number of routed layers that autograd goes through."""
        if not self.learns:
            return 0
        batch, objective = self.contestant.batches.batch, self.contestant.objective
        records = objective.run(batch, objective.context(batch, 0, 0)).router_outputs
        logits = [record.router_logits for record in records.values()]
        return sum(x is not None and x.requires_grad for x in logits)

    def row(self, part: str, name: str, goal: float | None = None) -> TuningRow:
        """Its row, without times."""
        contestant = self.contestant
        layers = self.layers()
        contestant.forget()  # gradients are then part of what the step holds
        return TuningRow(
            part,
            name,
            trainable=contestant.trainable if self.learns else 0,
            layers=layers,
            peak_mib=peak_mib(self.work, contestant.batches.device),
            saved_mib=live_saved_mib(self.work, contestant.parameters),
            goal=goal,
        )


class SampleBatches(Batches):
    """Batches whose rows are samples of a bank."""

    def draw(self) -> None:
        """A new batch."""
        super().draw()
        size = (self.sizes.batch_size,)
        drawn = torch.randint(NUM_SAMPLES, size, generator=self._generator, device=self.device)
        self.batch["sample"] = drawn


def all_ways(sizes: MoeSizes, last_layers: int, batches: Batches) -> dict[str, Way]:
    """The ways to tune, by name; the forward pass, and the steps with and without alignment, are of
    one model: where weights lie in memory matters by 2 %.
    """
    ways = {FULL: Way(_contestant(_model(sizes), batches, "objective=finetune", "loss=[]"))}
    for last in dict.fromkeys((sizes.num_layers, last_layers, 1)):
        name, model = routers_of(last, sizes), _model(sizes, last)
        ways[name] = Way(_contestant(model, batches, "objective=routing_alignment", "loss=[]"))
        if last == last_layers:
            ways[f"{name}, aligned"] = Way(_aligned(model, last, batches))
    forward = ways[routers_of(last_layers, sizes)].contestant
    return ways | {FORWARD: Way(forward, learns=False)}


def routers_of(last_layers: int, sizes: MoeSizes) -> str:
    """The name of steps that train the routers of the last layers."""
    return "all routers" if last_layers == sizes.num_layers else f"last {last_layers}"


def _model(sizes: MoeSizes, last_layers: int | None = None) -> HuggingFaceMoE:
    """All of it learns, or the routers of its last layers."""
    if last_layers is None:
        return HuggingFaceMoE(config=sizes.config())
    return HuggingFaceMoE(config=sizes.config(), trainable="routers", trainable_layers=last_layers)


def _contestant(model: HuggingFaceMoE, batches: Batches, *choices: str) -> Contestant:
    return Contestant(model, batches, compose("optimizer=adapter", *choices))


def _aligned(model: HuggingFaceMoE, last_layers: int, batches: Batches) -> Contestant:
    """The contestant whose loss pulls towards neighbours of a random bank, most of them solved."""
    made = _contestant(
        model,
        batches,
        "objective=routing_alignment",
        "loss=[manifold_alignment]",
        f"loss.manifold_alignment.layers={last_layers}",
    )
    objective = made.objective
    assert isinstance(objective, RoutingAlignment)
    blocks = [torch.randn(NUM_SAMPLES, n).softmax(1) for n in objective.bank_layers.values()]
    objective.use_bank(
        NeighbourBank(
            torch.randn(NUM_SAMPLES, 384),
            torch.cat(blocks, dim=1),
            torch.rand(NUM_SAMPLES) < 0.75,
            objective.bank_layers,
            objective.bank_token,
            {},
        )
    )
    return made


def tuning_table(sizes: MoeSizes, rows: list[TuningRow]) -> Table:
    """A row each, under a line for each part, within 80 columns."""
    notes = [f"{part}: {text}" for part, text in PARTS.items()]
    table = Table(
        title=str(sizes),
        caption="\n".join(notes + dropped(rows)),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    part = None
    for row in rows:
        if row.part != part:
            part = row.part
            table.add_section()
            table.add_row(f"[bold]{part}[/bold]")
        quartiles = "" if row.lower is None else f"{number(row.lower)}-{number(row.upper)}"
        milliseconds = "" if row.milliseconds is None else f"{row.milliseconds:.0f}"
        goal = "" if row.goal is None else f"{row.goal:.3g}"
        met = {True: "yes", False: "no", None: ""}[row.met]
        memory = [number(x) if x < 100 else f"{x:.0f}" for x in (row.peak_mib, row.saved_mib)]
        cells = (number(row.ratio), quartiles, milliseconds, str(row.layers), *memory, goal, met)
        table.add_row(f"  {row.name}", *cells)
    return table


def tuning_json(sizes: MoeSizes, rows: list[TuningRow], settings: Settings) -> dict[str, Any]:
    """Everything that was measured, and where."""
    found = {"environment": environment(settings), "sizes": asdict(sizes)}
    return found | {"rows": [asdict(row) for row in rows]}
