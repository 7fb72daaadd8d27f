"""``routerlab simulate``: what expert parallelism would cost, computed without devices."""

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from routerlab.analysis.expert_parallel.loads import (
    Case,
    hot_case,
    run_cases,
    trace_cases,
    zipf_case,
)
from routerlab.analysis.expert_parallel.machines import (
    LAYERS,
    MACHINES,
    MODELS,
    LayerShape,
    Machine,
    named,
)
from routerlab.analysis.expert_parallel.methods import (
    METHODS,
    Knobs,
    check_group,
    simulate_layer,
)
from routerlab.analysis.expert_parallel.model import STRATEGIES, Setup, simulate_model
from routerlab.core.checks import within
from routerlab.core.config import ConfigError, nearest
from routerlab.ops.least_loaded import TRIGGERS

Row = dict[str, Any]
_Changed = TypeVar("_Changed", LayerShape, Machine)
_LAYER = {
    "case": "loads", "devices": "devices", "group": "group", "method": "method",
    "max_load": "max load", "imbalance": "max/mean", "transfers": "transfers",
    "transfer_bytes": "moved MB", "compute_seconds": "experts ms",
    "exchange_seconds": "exchange ms", "seconds": "layer ms", "memory_bytes": "memory GB",
    "speedup": "speed-up",
}  # fmt: skip
_MODEL = {
    "devices": "devices", "strategy": "trainer", "group": "group", "method": "method",
    "state_bytes": "state GB", "working_bytes": "working GB",
    "activation_bytes": "activations GB", "memory_bytes": "in all GB", "fits": "fits",
    "seconds": "step ms", "exchange_seconds": "exchange ms", "exposed_seconds": "exposed ms",
    "efficiency": "efficiency", "mfu": "MFU",
}  # fmt: skip
_MAY_BE_ZERO = ("overhead", "latency", "planning")


def main(argv: Sequence[str]) -> int:
    """Prints the table. Exit codes: 0; 2 for bad input."""
    try:
        arguments = _parser().parse_args(list(argv))
    except SystemExit as stop:  # argparse has printed why, or the help
        return int(stop.code or 0)
    try:
        for name in ("json", "csv"):
            path = getattr(arguments, name)
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"--{name}={path}: its folder does not exist")
        rows = arguments.rows(arguments)
        _write(arguments, rows)
    except (ValueError, OSError) as error:
        print(f"routerlab simulate: {error}", file=sys.stderr)
        return 2
    _show(rows, _LAYER if arguments.rows is _layer_rows else _MODEL)
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Computes, and does not measure, the cost of plain expert parallelism (ep), " \
        "least-loaded expert parallelism (llep) and expert replication."  # fmt: skip
    parser = argparse.ArgumentParser(prog="routerlab simulate", description=about)
    whats = parser.add_subparsers(required=True, metavar="layer|model")
    layer = whats.add_parser("layer", help="one MoE layer of one batch, by each method")
    layer.set_defaults(rows=_layer_rows)
    add = layer.add_argument
    add("--model", default="gpt-oss-120b", help=f"{', '.join(LAYERS)} (default %(default)s)")
    for name in ("num-experts", "d-model", "d-ff", "top-k"):
        add(f"--{name}", type=int, metavar="N", help="instead of the model's")
    add("--devices", type=int, nargs="+", default=[8], metavar="P", help="in all (default 8)")
    add("--group", type=int, metavar="P", help="of each expert-parallel group (default: all)")
    add("--tokens", type=int, default=32768, help="of each device (default %(default)s)")
    add("--training", action="store_true", help="with the backward pass")
    _add_loads(layer, recorded=True)
    _add_common(layer)
    model = whats.add_parser("model", help="memory and time of a training step of a decoder")
    model.set_defaults(rows=_model_rows)
    add = model.add_argument
    add("--model", default="olmoe-1b-7b", help=f"{', '.join(MODELS)} (default %(default)s)")
    add("--devices", type=int, nargs="+", default=[1, 8, 64, 512, 1024], metavar="P")
    add("--strategy", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    add("--group", type=int, nargs="+", default=[1, 8], metavar="P", help="devices of an "
        "expert-parallel group (with fsdp); 1: none (default 1 8)")  # fmt: skip
    add("--method", nargs="+", default=["ep", "llep"], choices=METHODS)
    add("--tokens", type=int, default=16384, help="of each device (default %(default)s)")
    add("--seq-len", type=int, default=4096, help="(default %(default)s)")
    add("--checkpointing", action="store_true", help="activations are recomputed by block")
    _add_loads(model, recorded=False)
    _add_common(model)
    return parser


def _add_loads(parser: argparse.ArgumentParser, recorded: bool) -> None:
    add = parser.add_mutually_exclusive_group().add_argument
    add("--hot", nargs="+", metavar="SHARE:N", help="a share of all assignments evenly on the "
        "first N experts, as 0.8:4; the rest on the others (default: balance)")  # fmt: skip
    add("--zipf", nargs="+", type=float, metavar="S", help="shares by rank^-S, ranks drawn")
    if recorded:
        add("--run", metavar="DIR", help="the last training loads that a run recorded, by layer; "
            "replication is placed by those before")  # fmt: skip
        add("--trace", metavar="PATH", help="a recorded trace, or a run with one")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add, knobs = parser.add_argument, Knobs()
    add("--machine", default="h200", help=f"{', '.join(MACHINES)} (default %(default)s)")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of the machine: "
        + ", ".join(field.name for field in fields(Machine)))  # fmt: skip
    add("--alpha", type=float, default=knobs.alpha, help="of llep (default %(default)s)")
    add("--min-tokens", type=int, default=knobs.min_tokens, help="of llep (default %(default)s)")
    add("--threshold", default=str(knobs.threshold), help="of llep, or none (default %(default)s)")
    add("--trigger", default=knobs.trigger, choices=TRIGGERS)
    add("--keep-small-native", action="store_true", help="llep keeps an excess below min-tokens")
    add("--extra", type=int, default=knobs.extra, help="copies that a device has room for, of "
        "replication (default %(default)s)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    add("--csv", type=Path, metavar="FILE", help="write the rows there")


def _layer_rows(arguments: argparse.Namespace) -> list[Row]:
    shape = named("model", arguments.model, LAYERS)
    given = {f.name: getattr(arguments, f.name) for f in fields(LayerShape)}
    shape = _changed(shape, {k: v for k, v in given.items() if v is not None})
    within("--tokens", arguments.tokens, 1)
    rows: list[Row] = []
    for case in _cases(arguments, shape.num_experts):
        rows += _case_rows(arguments, case, replace(shape, num_experts=case.num_experts))
    return rows


def _case_rows(arguments: argparse.Namespace, case: Case, layer: LayerShape) -> list[Row]:
    machine, knobs, rows = _machine(arguments), _knobs(arguments), []
    for devices in arguments.devices:
        within("--devices", devices, 1)
        group = devices if arguments.group is None else arguments.group
        check_group(devices, group, layer.num_experts)
        total = arguments.tokens * layer.top_k * group
        expected = None if case.expected is None else case.expected(total)
        costs = simulate_layer(
            case.loads(total), layer, group, machine, knobs,
            training=arguments.training, expected=expected,
        )  # fmt: skip
        base = costs["ep"].seconds
        for method, cost in costs.items():
            about = {"case": case.name, "devices": devices, "group": group, "method": method}
            rows.append(about | asdict(cost) | {"speedup": base / cost.seconds})
    return rows


def _model_rows(arguments: argparse.Namespace) -> list[Row]:
    model, machine = named("model", arguments.model, MODELS), _machine(arguments)
    cases, knobs, rows = _cases(arguments, model.num_experts), _knobs(arguments), []
    if len(cases) > 1:
        raise ConfigError("--hot and --zipf take one value for a model")
    for devices, strategy, group in product(arguments.devices, arguments.strategy, arguments.group):
        if group > devices or (group > 1 and strategy != "fsdp"):
            continue
        for method in arguments.method if group > 1 else ["ep"]:
            setup = Setup(
                devices, strategy, group, method, arguments.tokens, arguments.seq_len,
                arguments.checkpointing,
            )  # fmt: skip
            cost = simulate_model(model, setup, machine, cases[0].loads, knobs)
            about = {"devices": devices, "strategy": strategy, "group": group}
            about["method"] = method if group > 1 else "none"
            rows.append(about | asdict(cost) | {"memory_bytes": cost.memory_bytes})
    if not rows:
        raise ConfigError("nothing to compute: every group has more devices than there are, or is "
                          "for another strategy than fsdp")  # fmt: skip
    return rows


def _cases(arguments: argparse.Namespace, num_experts: int) -> list[Case]:
    if getattr(arguments, "run", None):
        return run_cases(arguments.run)
    if getattr(arguments, "trace", None):
        return trace_cases(arguments.trace)
    if arguments.hot:
        return [hot_case(num_experts, *_hot(text)) for text in arguments.hot]
    return [zipf_case(num_experts, exponent) for exponent in arguments.zipf or [0.0]]


def _hot(text: str) -> tuple[float, int]:
    share, _, hot = text.partition(":")
    try:
        return float(share), int(hot)
    except ValueError:
        raise ConfigError(f"--hot {text}: must be SHARE:N, as 0.8:4") from None


def _knobs(arguments: argparse.Namespace) -> Knobs:
    text = arguments.threshold
    try:
        threshold = None if text == "none" else float(text)
    except ValueError:
        raise ConfigError(f"--threshold={text}: must be a number, or none") from None
    return Knobs(
        arguments.alpha, arguments.min_tokens, threshold, arguments.trigger,
        arguments.keep_small_native, arguments.extra,
    )  # fmt: skip


def _machine(arguments: argparse.Namespace) -> Machine:
    machine, values = named("machine", arguments.machine, MACHINES), {}
    known = {field.name for field in fields(Machine)}
    for text in arguments.set:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(f"--set {text}: no such field; {nearest(name, known)}")
        try:
            values[name] = int(value) if name == "devices_per_node" else float(value)
        except ValueError:
            raise ConfigError(f"--set {text}: {value!r} is no number") from None
    return _changed(machine, values)


def _changed(shape: _Changed, values: dict[str, Any]) -> _Changed:
    for name, value in values.items():
        most = 1 if name.endswith("_reached") else math.inf
        within(name, value, 0, most, above=not name.endswith(_MAY_BE_ZERO))
    return replace(shape, **values)


def _write(arguments: argparse.Namespace, rows: list[Row]) -> None:
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _show(rows: list[Row], columns: dict[str, str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for key, title in columns.items():
        justify = "left" if isinstance(rows[0][key], str) else "right"
        table.add_column(title.replace(" ", "\n"), justify=justify)
    for row in rows:
        table.add_row(*(_text(row[key], title) for key, title in columns.items()))
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 200)  # in a narrow terminal lines break, numbers stay whole
    console.print(table)
    console.print(
        "Computed from a cost model, not measured; docs/scaling.md says what it leaves out."
    )


def _text(value: Any, title: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("ms", 1e-3)):
        if title.endswith(unit):
            return f"{value / size:.1f}"
    return str(value) if isinstance(value, int) else f"{value:.2f}"
