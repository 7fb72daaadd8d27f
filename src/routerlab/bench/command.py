"""`routerlab bench`: what is asked for, and the table and file that come back."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routerlab.bench import adapter_sizes, moe_sizes, step_size
from routerlab.bench.arguments import SUBJECTS, given, numbers, parser

if TYPE_CHECKING:  # at run time torch is imported only once the arguments can be read
    from routerlab.bench.layer import Settings
    from routerlab.bench.step import StepShare

STEP_SECONDS = 5  # seconds for a variant of the training step, in units of --seconds


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark that ``argv`` names. Exit codes: 0, 1 (a contestant was refused because it
    is not equal to the reference), 2 (bad arguments).
    """
    if not argv:
        print("usage: routerlab bench SUBJECT [options]\n\nsubjects:")
        for name, text in SUBJECTS.items():
            print(f"  {name:9} {text}")
        return 0
    try:
        arguments = parser().parse_args(list(argv))
    except SystemExit as stop:  # argparse has printed why, or the help
        return int(stop.code or 0)
    try:
        return _bench(arguments)
    except ValueError as error:
        print(f"routerlab bench: {error}", file=sys.stderr)
        return 2


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.seconds <= 0:
        raise ValueError(f"--seconds={arguments.seconds}: must be above 0")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads={arguments.threads}: must be at least 1")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise ValueError(f"--json={arguments.json}: its folder does not exist")

    import torch

    from routerlab.bench.layer import Settings

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: torch finds no GPU")
    if arguments.device == "cuda" and arguments.clock == "cpu":
        raise ValueError("--clock=cpu: does not see what a GPU does; use wall")
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or threads)
    try:
        settings = Settings(
            arguments.seconds,
            torch.device(arguments.device),
            arguments.seed,
            time.process_time if arguments.clock == "cpu" else time.perf_counter,
        )
        return _RUNS[arguments.subject](arguments, settings)
    finally:
        torch.set_num_threads(threads)


def _bench_layer(arguments: argparse.Namespace, settings: "Settings") -> int:
    from rich.console import Console

    from routerlab.bench import layer, report
    from routerlab.bench.contestants import PATHS, Shape

    named = {"quick": layer.QUICK, "full": layer.FULL, "grid": layer.GRID}
    texts = named.get(arguments.shapes) or [t for t in arguments.shapes.split(";") if t.strip()]
    shapes = [Shape.parse(text) for text in texts]
    if not shapes:
        raise ValueError(f"--shapes={arguments.shapes!r}: names no shape")
    dtypes = arguments.dtypes.split(",")
    paths = list(PATHS) if arguments.paths == "all" else arguments.paths.split(",")
    layer.check_names(dtypes, paths)
    rows: list[layer.Row] = []
    share = None
    console = Console()
    with console.status("") as status:
        for shape in shapes:
            for dtype in dtypes:
                rows += layer.bench_shape(shape, dtype, paths, settings, status.update)
        if arguments.step:
            share = _bench_step(settings, status.update)
    console.print(report.table(rows))
    if share is not None:
        console.print("\n".join(report.step_lines(share)), highlight=False)
    if arguments.json is not None:
        _write(arguments.json, report.as_json(rows, share, settings))
    return int(any(row.status.startswith("refused") for row in rows))


def _bench_step(settings: "Settings", progress: Callable[[str], None]) -> "StepShare":
    from routerlab.bench.step import bench_step

    progress("a training step with and without losses and diagnostics")
    # its differences are a few percent: they need more samples than a ratio of 2
    return bench_step(replace(settings, seconds=STEP_SECONDS * settings.seconds))


def _bench_routers(arguments: argparse.Namespace, settings: "Settings") -> int:
    from rich.console import Console

    from routerlab.bench import report
    from routerlab.bench.contestants import Shape
    from routerlab.bench.router_contestants import contestant_names
    from routerlab.bench.routers import bench_routers

    shape = Shape.parse(arguments.shape)
    names = contestant_names(arguments.routers)
    console = Console()
    with console.status("") as status:
        found = bench_routers(shape, names, settings, status.update)
    console.print(report.routers_table(found))
    if arguments.json is not None:
        _write(arguments.json, report.routers_json(found, settings))
    return 0


def _bench_adapters(arguments: argparse.Namespace, settings: "Settings") -> int:
    sizes = adapter_sizes.sizes_of(arguments.base, given(arguments, adapter_sizes.names()))
    samples = numbers(arguments.samples)

    from rich.console import Console

    from routerlab.bench.adapter_contestants import method_names
    from routerlab.bench.adapter_report import adapters_json, adapters_table
    from routerlab.bench.adapters import bench_adapters

    methods = method_names(arguments.adapters)
    console = Console()
    with console.status("") as status:
        found = bench_adapters(sizes, methods, samples, settings, status.update)
    console.print(adapters_table(found))
    if arguments.json is not None:
        _write(arguments.json, adapters_json(found, settings))
    return 0


def _bench_recording(arguments: argparse.Namespace, settings: "Settings") -> int:
    sizes = moe_sizes.MoeSizes(**given(arguments, moe_sizes.names()))

    from rich.console import Console

    from routerlab.bench import recording

    console = Console()
    with console.status("") as status:
        rows = recording.bench_recording(sizes, settings, status.update)
    console.print(recording.recording_table(sizes, rows))
    if arguments.json is not None:
        _write(arguments.json, recording.recording_json(sizes, rows, settings))
    return 0


def _bench_tuning(arguments: argparse.Namespace, settings: "Settings") -> int:
    sizes = moe_sizes.MoeSizes(**given(arguments, moe_sizes.names()))

    from rich.console import Console

    from routerlab.bench import tuning

    console = Console()
    with console.status("") as status:
        rows = tuning.bench_tuning(sizes, arguments.last_layers, settings, status.update)
    console.print(tuning.tuning_table(sizes, rows))
    if arguments.json is not None:
        _write(arguments.json, tuning.tuning_json(sizes, rows, settings))
    return 0


def _bench_training(arguments: argparse.Namespace, settings: "Settings") -> int:
    size = step_size.StepSize(**given(arguments, step_size.names()))

    from rich.console import Console

    from routerlab.bench import training, training_report

    console = Console()
    with console.status("") as status:
        found = training.bench_training(size, settings, arguments.start_up, progress=status.update)
    console.print(training_report.training_table(found))
    console.print("\n".join(training_report.training_lines(found)), highlight=False)
    if arguments.json is not None:
        _write(arguments.json, training_report.training_json(found, settings))
    return 0


def _bench_running(arguments: argparse.Namespace, settings: "Settings") -> int:
    from rich.console import Console

    from routerlab.bench import running

    numbers = running.Numbers(arguments.jobs, arguments.runs, arguments.steps)
    if not arguments.folder.is_dir():
        raise ValueError(f"--folder={arguments.folder}: no such folder")
    console = Console()
    with console.status("") as status:
        rows = running.bench_running(numbers, settings, arguments.folder, status.update)
    console.print(running.running_table(rows))
    if arguments.json is not None:
        _write(arguments.json, running.running_json(numbers, rows, settings))
    return 0


_RUNS: dict[str, Callable[[argparse.Namespace, "Settings"], int]] = {
    "layer": _bench_layer,
    "routers": _bench_routers,
    "adapters": _bench_adapters,
    "recording": _bench_recording,
    "tuning": _bench_tuning,
    "training": _bench_training,
    "running": _bench_running,
}


def _write(file: Path, found: dict[str, Any]) -> None:
    file.write_text(json.dumps(found, indent=2) + "\n")
