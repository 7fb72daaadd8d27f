"""The benchmark of one MoE layer: forward and backward against a dense layer of equal FLOPs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from routerlab.bench.contestants import (
    DTYPES,
    PATHS,
    Contestant,
    Shape,
    UnequalError,
    build_dense,
    check_equal,
    reference_layer,
)
from routerlab.bench.memory import peak_mib, saved_mib
from routerlab.bench.timing import Clock, Ratio, interleave
from routerlab.moe.layer import MoE

QUICK = ("4096,256,256,16,2", "1024,64,128,8,2")
FULL = (
    "4096,256,256,16,2",
    "4096,128,128,64,8",
    "1024,128,128,64,8",
    "1024,64,128,8,2",
    "256,64,128,8,2",
    "4096,64,64,64,4",
    "2048,256,128,64,4",
    "16384,256,256,16,2",
)
GRID = tuple(f"{t},256,128,{e},4" for t in (256, 2048, 16384) for e in (8, 64, 256))
_SHARED_MEAN = 0.3  # tokens have a common direction, as in models: it skews the load (CV 0.2-0.5)


@dataclass(frozen=True, slots=True)
class Row:
    """One shape, dtype and path. Without ``status == "ok"`` there are no figures.

    ``ratio`` (with quartiles) is the time over the dense layer's, ``to_transformers`` the same over
    the fastest transformers path of the run.
    """

    shape: str
    dtype: str
    path: str
    status: str = "ok"
    ratio: float | None = None
    lower: float | None = None
    upper: float | None = None
    milliseconds: float | None = None
    samples: int | None = None
    busy: int | None = None
    to_transformers: float | None = None
    peak_mib: float | None = None
    peak_to_dense: float | None = None
    saved_mib: float | None = None
    difference: float | None = None
    load_cv: float | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure: ``seconds`` for a cell, its dense samples included."""

    seconds: float
    device: torch.device
    seed: int = 0
    clock: Clock = time.perf_counter


class Tokens:
    """Tokens and output gradients of a shape, drawn anew for every step.

    A new draw is a new routing. A pool of draws would not do: the kernels that oneDNN builds for a
    bf16 product of a new size would soon all be in its cache, as they never are in training.
    """

    def __init__(self, shape: Shape, device: torch.device, seed: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        size = (shape.tokens, shape.d_model)
        self._mean = torch.empty(shape.d_model, device=device)
        self._mean.normal_(0, _SHARED_MEAN, generator=self._generator)
        self.x = torch.empty(size, device=device, requires_grad=True)
        self.dy = torch.empty(size, device=device).normal_(generator=self._generator)
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """New tokens, in place."""
        self.x.normal_(generator=self._generator).add_(self._mean)


def check_names(dtypes: Sequence[str], paths: Sequence[str]) -> None:
    """`ValueError` for a dtype or path that does not exist."""
    for field, values, known in (("dtypes", dtypes, DTYPES), ("paths", paths, PATHS)):
        for value in values:
            if value not in known:
                raise ValueError(f"{field}={value!r}: must be among {', '.join(known)}")


def bench_shape(
    shape: Shape,
    dtype: str,
    paths: Sequence[str],
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """A row for the dense layer, then one for each path."""
    torch.manual_seed(settings.seed)
    layer = reference_layer(shape, settings.device)
    tokens = Tokens(shape, settings.device, settings.seed)
    dense = build_dense(shape, settings.device)
    cell = _Cell(shape, dtype, layer, dense, tokens, settings)
    rows: dict[str, Row] = {}
    ready: dict[str, tuple[Contestant, float]] = {}
    for path in paths:
        progress(f"{shape} {dtype} {path}: comparing with the float64 loop")
        try:
            contestant = PATHS[path](layer)
            ready[path] = contestant, check_equal(contestant, layer, tokens.x, tokens.dy, dtype)
        except UnequalError as error:
            rows[path] = Row(str(shape), dtype, path, f"refused: {error}")
        except (RuntimeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            rows[path] = Row(str(shape), dtype, path, f"not supported: {reason}")
    # Contestants with sizes of their own fill oneDNN's kernel cache for all others: bf16 runs them
    # one at a time.
    groups = [[path] for path in ready] if dtype == "bf16" else [list(ready)]
    measured: list[Row] = []
    for group in filter(None, groups):
        progress(f"{shape} {dtype} {', '.join(group)}: timing")
        measured += cell.measure({path: ready[path] for path in group})
    rows |= {row.path: row for row in measured}
    return [cell.dense_row(), *against_transformers([rows[path] for path in paths])]


def against_transformers(rows: Sequence[Row]) -> list[Row]:
    """The rows with ``to_transformers`` filled in, where a transformers path was timed."""
    times = [row.ratio for row in rows if row.path.startswith("hf_") and row.ratio is not None]
    if not times:
        return list(rows)
    return [
        row if row.ratio is None else replace(row, to_transformers=row.ratio / min(times))
        for row in rows
    ]


class _Cell:
    """The contestants of one shape and dtype."""

    def __init__(
        self,
        shape: Shape,
        dtype: str,
        layer: MoE,
        dense: Contestant,
        tokens: Tokens,
        settings: Settings,
    ) -> None:
        self.shape, self.dtype, self.dense = str(shape), dtype, dense
        self.tokens, self.settings, self.autocast = tokens, settings, dtype == "bf16"
        with torch.no_grad():
            counts = layer(tokens.x)[1].tokens_per_expert.double()
        self.load_cv = float(counts.std(unbiased=False) / counts.mean())
        self.dense_milliseconds: list[float] = []
        self.dense_peak, self.dense_saved = self._memory(dense)

    def measure(self, contestants: dict[str, tuple[Contestant, float]]) -> list[Row]:
        """The rows of contestants that take turns."""
        s = self.settings
        steps = {name: self._step(contestant) for name, (contestant, _) in contestants.items()}
        timed, dense = interleave(
            steps, self._step(self.dense), self.tokens.draw, s.seconds, s.device, s.clock
        )
        self.dense_milliseconds.append(dense)
        return [self._row(path, timed[path], *contestants[path]) for path in contestants]

    def dense_row(self) -> Row:
        """The baseline's own figures."""
        times = self.dense_milliseconds
        return Row(
            self.shape,
            self.dtype,
            "dense",
            ratio=1.0,
            milliseconds=sum(times) / len(times) if times else None,
            peak_mib=self.dense_peak,
            peak_to_dense=1.0,
            saved_mib=self.dense_saved,
        )

    def _row(self, path: str, timed: Ratio, contestant: Contestant, difference: float) -> Row:
        peak, saved = self._memory(contestant)
        return Row(
            self.shape,
            self.dtype,
            path,
            ratio=timed.median,
            lower=timed.lower,
            upper=timed.upper,
            milliseconds=timed.milliseconds,
            samples=timed.samples,
            busy=timed.busy,
            peak_mib=peak,
            peak_to_dense=peak / self.dense_peak,
            saved_mib=saved,
            difference=difference,
            load_cv=self.load_cv,
        )

    def _step(self, contestant: Contestant) -> Callable[[], Tensor]:
        return lambda: contestant.step(self.tokens.x, self.tokens.dy, self.autocast)

    def _memory(self, contestant: Contestant) -> tuple[float, float]:
        x, own = self.tokens.x, contestant.weights
        for leaf in (x, *own):
            leaf.grad = None
        saved = saved_mib(lambda: contestant.run(x, self.autocast), own)
        return peak_mib(self._step(contestant), x.device), saved
