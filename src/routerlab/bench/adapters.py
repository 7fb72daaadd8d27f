"""What adapters cost: training steps and memory next to plain LoRA, and what samples cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from routerlab.bench.adapter_contestants import (
    SOFT,
    Batches,
    Contestant,
    activated_rank,
    build_lora,
    build_method,
    random_base,
)
from routerlab.bench.adapter_sizes import AdapterSizes
from routerlab.bench.layer import Settings
from routerlab.bench.memory import live_saved_mib, peak_mib
from routerlab.bench.timing import Ratio, interleave
from routerlab.objectives.sample_forms import FORMS

SOFT_GOAL = 1.35  # times plain LoRA of the same activated rank
EVALUATION_GOAL = 1.05  # times the soft mixture: the same work, and some noise

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """One contestant. Without ``status == "ok"`` there are no figures.

    ``part`` says what ``ratio`` is a multiple of: ``method`` (plain LoRA of rank ``lora_rank``),
    ``samples`` or ``evaluation`` (the soft mixture without its balancing loss). ``peak_ratio``: the
    peak over the baseline's.
    """

    part: str
    name: str
    goal: float | None = None
    status: str = "ok"
    picks: float | None = None
    lora_rank: int | None = None
    trainable: int | None = None
    ratio: float | None = None
    lower: float | None = None
    upper: float | None = None
    milliseconds: float | None = None
    met: bool | None = None
    peak_mib: float | None = None
    peak_ratio: float | None = None
    saved_mib: float | None = None
    samples: int | None = None
    busy: int | None = None

    def timed(self, ratio: Ratio) -> "AdapterRow":
        """The row with the figures of a ratio to its baseline."""
        return replace(
            self,
            ratio=ratio.median,
            lower=ratio.lower,
            upper=ratio.upper,
            milliseconds=ratio.milliseconds,
            met=None if self.goal is None else ratio.median <= self.goal,
            samples=ratio.samples,
            busy=ratio.busy,
        )


@dataclass(frozen=True, slots=True)
class AdaptersFound:
    """The rows of a run, and the sizes."""

    sizes: str
    rows: list[AdapterRow]


def sample_goal(form: str, num_samples: int) -> float | None:
    """The most soft-mixture steps that a step of M samples may take: a frozen base's backward pass
    costs about a forward pass, so M - 1 of M backward passes saved are half the time.
    """
    return {"replicated": 1.05 * num_samples, "cheap": 0.55 * (num_samples + 1)}.get(form)


def bench_adapters(
    sizes: AdapterSizes,
    names: Sequence[str],
    num_samples: Sequence[int],
    settings: Settings,
    progress: Progress = lambda text: None,
) -> AdaptersFound:
    """A row for each method of ``names``, for each form of each M, and for ReMix's evaluation."""
    if any(m < 2 for m in num_samples):
        raise ValueError(f"samples={','.join(map(str, num_samples))}: each must be at least 2")
    torch.manual_seed(settings.seed)
    with random_base(sizes) as base:
        cell = _Cell(sizes, base, settings, progress)
        rows = [cell.method(name) for name in names]
        rows += cell.samples(num_samples)
    return AdaptersFound(str(sizes), rows)


class _Cell:
    """Contestants on one base model, and the batches that all of them are shown."""

    def __init__(
        self, sizes: AdapterSizes, base: Path, settings: Settings, progress: Progress
    ) -> None:
        self.sizes, self.base, self.settings, self.progress = sizes, base, settings, progress
        self.batches = Batches(sizes, settings.device, settings.seed)

    def method(self, name: str) -> AdapterRow:
        """A method's row, from steps that take turns with plain LoRA's."""
        goal = SOFT_GOAL if name == SOFT else None
        self.progress(f"{name}: a step of its own, and one of plain LoRA")
        try:
            contestant = build_method(name, self.sizes, self.base, self.batches)
            picks = contestant.picks()
            rank = activated_rank(contestant, picks)
            lora = build_lora(contestant, rank, self.base)
            contestant.step()
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            return AdapterRow("method", name, goal, f"not supported: {reason}")
        self.progress(f"{name}: timing")
        timed, _ = self._interleave({name: contestant.step}, lora.step)
        row = AdapterRow("method", name, goal, picks=picks, lora_rank=rank).timed(timed[name])
        return self._with_memory(row, contestant, self._peak(lora))

    def samples(self, numbers: Sequence[int]) -> list[AdapterRow]:
        """The rows of the soft mixture without its loss, and of ReMix's forms and its evaluation,
        which take turns with it.
        """
        soft = build_method(SOFT, self.sizes, self.base, self.batches, losses=False)
        rows: dict[str, AdapterRow] = {}
        found: dict[str, Contestant] = {}
        for m in numbers:
            for form in FORMS:
                name = f"{form} M={m}"
                knobs = {"num_samples": m, "sample_form": form}
                found[name] = build_method("remix", self.sizes, self.base, self.batches, **knobs)
                rows[name] = AdapterRow("samples", name, sample_goal(form, m))
        self.progress(f"timing {', '.join(found) or 'the soft mixture'}")
        steps = {name: contestant.step for name, contestant in found.items()}
        timed, milliseconds = self._interleave(steps, soft.step)
        peak = self._peak(soft)
        base = AdapterRow("samples", SOFT, ratio=1.0, milliseconds=milliseconds)
        done = [self._with_memory(base, soft, peak)]
        for name, row in rows.items():
            self.progress(f"{name}: memory")
            done.append(self._with_memory(row.timed(timed[name]), found[name], peak))
        return [*done, self._evaluation(soft)]

    def _evaluation(self, soft: Contestant) -> AdapterRow:
        self.progress("evaluation")
        remix = build_method("remix", self.sizes, self.base, self.batches)
        for contestant in (soft, remix):
            contestant.objective.eval()
        timed, _ = self._interleave({"remix": remix.run}, soft.run)
        row = AdapterRow("evaluation", "remix", EVALUATION_GOAL, picks=remix.picks())
        return row.timed(timed["remix"])

    def _interleave(
        self, steps: Mapping[str, Callable[[], object]], baseline: Callable[[], object]
    ) -> tuple[dict[str, Ratio], float]:
        s = self.settings
        return interleave(steps, baseline, self.batches.draw, s.seconds, s.device, s.clock)

    def _peak(self, contestant: Contestant) -> float:
        contestant.forget()  # gradients are then part of what the step holds
        return peak_mib(contestant.step, self.settings.device)

    def _with_memory(self, row: AdapterRow, contestant: Contestant, baseline: float) -> AdapterRow:
        peak = self._peak(contestant)
        return replace(
            row,
            peak_mib=peak,
            peak_ratio=peak / baseline,
            saved_mib=live_saved_mib(contestant.step, contestant.parameters),
            trainable=contestant.trainable,
        )
