"""`routerlab bench`: what is asked for, and the table and file that come back."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routerlab.bench import adapter_sizes, moe_sizes

if TYPE_CHECKING:  # at run time torch is imported only once the arguments can be read
    from routerlab.bench.layer import Settings
    from routerlab.bench.step import StepShare

SUBJECTS = {
    "layer": "one MoE layer against a dense layer and transformers; losses, diagnostics",
    "routers": "every router as a share of the MoE layer, next to token choice",
    "adapters": "mixtures of LoRA against plain LoRA; samples of ReMix against the soft mixture",
    "recording": "a model of transformers whose routings are recorded, against the same without",
    "tuning": "tuning the routers of a model of transformers, against full fine-tuning",
    "running": "what checkpoints, comparisons and sweeps cost beside the training itself",
}
ROUTERS_SHAPE = "4096,256,256,64,8"
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
        arguments = _parser().parse_args(list(argv))
    except SystemExit as stop:  # argparse has printed why, or the help
        return int(stop.code or 0)
    try:
        return _bench(arguments)
    except ValueError as error:
        print(f"routerlab bench: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="routerlab bench")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    layer = subjects.add_parser("layer", help=SUBJECTS["layer"])
    add = layer.add_argument
    add("--shapes", default="quick", help="quick, full, or T,D,F,E,K;T,D,F,E,K;...")
    add("--dtypes", default="float32,bf16", help="float32, bf16 (autocast) or both")
    add("--paths", default="all", help="all, or some of autograd,loop,hf_grouped_mm,hf_eager,...")
    add("--seconds", type=float, default=1.5, help="for each cell of the table (default 1.5)")
    add("--step", action=argparse.BooleanOptionalAction, default=True, help="training step, too")
    _add_common(layer)
    routers = subjects.add_parser("routers", help=SUBJECTS["routers"])
    add = routers.add_argument
    add("--routers", default="all", help="all, or some of NAME,token_choice+BALANCER,LOSS,...")
    add("--shape", default=ROUTERS_SHAPE, help=f"T,D,F,E,K (default {ROUTERS_SHAPE})")
    add("--seconds", type=float, default=2.0, help="for each router (default 2)")
    _add_common(routers)
    adapters = subjects.add_parser("adapters", help=SUBJECTS["adapters"])
    add = adapters.add_argument
    add("--adapters", default="all", help="all, or some of soft,mixlora,hydralora,...")
    add("--samples", default="2,4,8", help="M of ReMix (default 2,4,8), or none")
    add("--base", default="small", choices=tuple(adapter_sizes.BASES), help="base model")
    _add_sizes(adapters, adapter_sizes.names())
    add("--seconds", type=float, default=5.0, help="for each contestant (default 5)")
    _add_common(adapters)
    recording = subjects.add_parser("recording", help=SUBJECTS["recording"])
    recording.add_argument("--seconds", type=float, default=5.0, help="for each row (default 5)")
    _add_sizes(recording, moe_sizes.names())
    _add_common(recording)
    tuning = subjects.add_parser("tuning", help=SUBJECTS["tuning"])
    add = tuning.add_argument
    add("--last-layers", type=int, default=5, help="whose routers are tuned (default 5)")
    add("--seconds", type=float, default=5.0, help="for each row (default 5)")
    _add_sizes(tuning, moe_sizes.names())
    _add_common(tuning)
    running = subjects.add_parser("running", help=SUBJECTS["running"])
    add = running.add_argument
    add("--jobs", type=int, default=3, help="of a sweep (default 3)")
    add("--runs", type=int, default=200, help="that are compared (default 200)")
    add("--steps", type=int, default=2000, help="that each of them has logged (default 2000)")
    add(
        "--folder", type=Path, default=Path(), help="where runs are written and deleted (default .)"
    )
    add("--seconds", type=float, default=20.0, help="of training with checkpoints (default 20)")
    _add_common(running)
    return parser


def _add_sizes(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    for name in names:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, metavar="N", help="instead of the default")


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, int]:
    """The sizes that were asked for."""
    found = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--threads", type=int, help="CPU threads (default: as torch chooses)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--clock", default="wall", choices=("wall", "cpu"), help="cpu: for one thread, when busy")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write the figures there")


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

    named = {"quick": layer.QUICK, "full": layer.FULL}
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
    sizes = adapter_sizes.sizes_of(arguments.base, _given(arguments, adapter_sizes.names()))
    numbers = _numbers(arguments.samples)

    from rich.console import Console

    from routerlab.bench.adapter_contestants import method_names
    from routerlab.bench.adapter_report import adapters_json, adapters_table
    from routerlab.bench.adapters import bench_adapters

    methods = method_names(arguments.adapters)
    console = Console()
    with console.status("") as status:
        found = bench_adapters(sizes, methods, numbers, settings, status.update)
    console.print(adapters_table(found))
    if arguments.json is not None:
        _write(arguments.json, adapters_json(found, settings))
    return 0


def _bench_recording(arguments: argparse.Namespace, settings: "Settings") -> int:
    sizes = moe_sizes.MoeSizes(**_given(arguments, moe_sizes.names()))

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
    sizes = moe_sizes.MoeSizes(**_given(arguments, moe_sizes.names()))

    from rich.console import Console

    from routerlab.bench import tuning

    console = Console()
    with console.status("") as status:
        rows = tuning.bench_tuning(sizes, arguments.last_layers, settings, status.update)
    console.print(tuning.tuning_table(sizes, rows))
    if arguments.json is not None:
        _write(arguments.json, tuning.tuning_json(sizes, rows, settings))
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


def _numbers(text: str) -> list[int]:
    if text == "none":
        return []
    words = text.split(",")
    if not all(word.strip().isdigit() for word in words):
        raise ValueError(
            f"--samples={text!r}: must be whole numbers from 2, such as 2,4,8, or none"
        )
    return list(dict.fromkeys(map(int, words)))


_RUNS: dict[str, Callable[[argparse.Namespace, "Settings"], int]] = {
    "layer": _bench_layer,
    "routers": _bench_routers,
    "adapters": _bench_adapters,
    "recording": _bench_recording,
    "tuning": _bench_tuning,
    "running": _bench_running,
}


def _write(file: Path, found: dict[str, Any]) -> None:
    file.write_text(json.dumps(found, indent=2) + "\n")
