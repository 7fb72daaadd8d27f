"""What listening to the routers of a model of transformers costs."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from routerlab.backbones.hugging_face import HuggingFaceMoE
from routerlab.bench.layer import Settings
from routerlab.bench.moe_sizes import MoeSizes
from routerlab.bench.report import dropped, environment, number
from routerlab.bench.timing import Ratio, interleave
from routerlab.core.routing import RoutingContext

GOAL = 1.05  # times the plain model's forward pass
_COLUMNS = ("", "x plain", "quartiles", "ms", "goal", "met")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RecordingRow:
    """One kind of pass: its time over that of the model without records."""

    name: str
    ratio: float
    lower: float
    upper: float
    milliseconds: float
    samples: int
    busy: int
    goal: float | None
    met: bool | None

    @classmethod
    def of(cls, name: str, found: Ratio, goal: float | None) -> "RecordingRow":
        """The row of a ratio."""
        met = None if goal is None else found.median <= goal
        return cls(
            name,
            found.median,
            found.lower,
            found.upper,
            found.milliseconds,
            found.samples,
            found.busy,
            goal,
            met,
        )


def bench_recording(
    sizes: MoeSizes, settings: Settings, progress: Progress = lambda text: None
) -> list[RecordingRow]:
    """A row each for a forward pass, one over padded sequences, and a forward and backward pass."""
    torch.manual_seed(settings.seed)
    ours = HuggingFaceMoE(config=sizes.config()).to(settings.device)
    plain: Any = AutoModelForCausalLM.from_config(ours.model.config).to(settings.device).eval()
    weights = {**ours.model.state_dict(keep_vars=True)}
    plain.load_state_dict(weights, assign=True)  # the same memory: where it lies matters by 2 %
    work = _Work(sizes, settings.device)
    rows = []
    for name, padded, learns in (
        ("forward", False, False),
        ("forward, padded", True, False),
        ("forward and backward", False, True),
    ):
        progress(name)

        def run(call: Callable[[], Any], learns: bool = learns) -> None:
            with torch.set_grad_enabled(learns):
                logits = call()
            if learns:
                logits.backward(torch.ones_like(logits))

        def recorded(padded: bool = padded) -> Tensor:
            return ours(work.ids, work.context(padded)).logits

        def alone(padded: bool = padded) -> Tensor:
            return plain(work.ids, use_cache=False, **work.arguments(padded)).logits

        found, _ = interleave(
            {name: lambda recorded=recorded: run(recorded)},
            lambda alone=alone: run(alone),
            work.draw,
            settings.seconds,
            settings.device,
            settings.clock,
        )
        rows.append(RecordingRow.of(name, found[name], None if learns else GOAL))
    return rows


class _Work:
    """A batch, drawn anew before each sample; half of its sequences may be half padding."""

    def __init__(self, sizes: MoeSizes, device: torch.device) -> None:
        self.shape, self.symbols = (sizes.batch_size, sizes.sequence_length), sizes.vocab_size
        lengths = torch.full((sizes.batch_size, 1), sizes.sequence_length)
        lengths[::2] //= 2
        places = torch.arange(sizes.sequence_length - 1, -1, -1)
        self.valid, self.device = (places < lengths).to(device), device
        self.draw()

    def draw(self) -> None:
        """Other tokens."""
        self.ids = torch.randint(self.symbols, self.shape, device=self.device)

    def context(self, padded: bool) -> RoutingContext:
        """What our model is told."""
        return RoutingContext(*self.shape, valid=self.valid.flatten() if padded else None)

    def arguments(self, padded: bool) -> dict[str, Tensor]:
        """What the plain model is told."""
        if not padded:
            return {}
        mask = self.valid.long()
        return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def recording_table(sizes: MoeSizes, rows: list[RecordingRow]) -> Table:
    """A row each kind of pass."""
    notes = ["x plain: time with records over that of the same model without"]
    table = Table(title=str(sizes), caption="\n".join(notes + dropped(rows)), box=box.SIMPLE_HEAD)
    for index, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        quartiles = f"{number(row.lower)}-{number(row.upper)}"
        goal = "" if row.goal is None else f"{row.goal:.3g}"
        met = {True: "yes", False: "no", None: ""}[row.met]
        table.add_row(row.name, number(row.ratio), quartiles, f"{row.milliseconds:.1f}", goal, met)
    return table


def recording_json(sizes: MoeSizes, rows: list[RecordingRow], settings: Settings) -> dict[str, Any]:
    """Everything that was measured, and where."""
    found = {"environment": environment(settings), "sizes": asdict(sizes)}
    return found | {"rows": [asdict(row) for row in rows]}
