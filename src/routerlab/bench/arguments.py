"""The arguments of `routerlab bench`: light, so that help and errors come at once."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from routerlab.bench import adapter_sizes, moe_sizes, step_size

SUBJECTS = {
    "layer": "one MoE layer against a dense layer and transformers; losses, diagnostics",
    "routers": "every router as a share of the MoE layer, next to token choice",
    "adapters": "mixtures of LoRA against plain LoRA; samples of ReMix against the soft mixture",
    "recording": "a model of transformers whose routings are recorded, against the same without",
    "tuning": "tuning the routers of a model of transformers, against full fine-tuning",
    "training": "whole training against bare loops, losses and diagnostics, start-up",
    "running": "what checkpoints, comparisons and sweeps cost beside the training itself",
}
ROUTERS_SHAPE = "4096,256,256,64,8"


def parser() -> argparse.ArgumentParser:
    """Of all subjects."""
    parser = argparse.ArgumentParser(prog="routerlab bench")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    layer = subjects.add_parser("layer", help=SUBJECTS["layer"])
    add = layer.add_argument
    add("--shapes", default="quick", help="quick, full, grid, or T,D,F,E,K;T,D,F,E,K;...")
    add("--dtypes", default="float32,bf16", help="float32, bf16 (autocast) or both")
    add("--paths", default="all", help="all, or some of auto,recompute,hf_grouped_mm,...")
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
    training = subjects.add_parser("training", help=SUBJECTS["training"])
    add = training.add_argument
    add("--start-up", action=argparse.BooleanOptionalAction, default=True, help="start-up, too")
    add("--seconds", type=float, default=20.0, help="for each contestant (default 20)")
    _add_sizes(training, step_size.names())
    _add_common(training)
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


def given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, int]:
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


def numbers(text: str) -> list[int]:
    """Those of ``--samples``."""
    if text == "none":
        return []
    words = text.split(",")
    if not all(word.strip().isdigit() for word in words):
        raise ValueError(
            f"--samples={text!r}: must be whole numbers from 2, such as 2,4,8, or none"
        )
    return list(dict.fromkeys(map(int, words)))
