"""``routerlab audit-loss``: what each framework's balancing rule says of the same routing."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time torch is imported only once the arguments can be read
    from torch import Tensor

    from routerlab.analysis.audit_loss import Audit
    from routerlab.analysis.balancing_rules import RoutingSums

MASK = "attention_mask"  # the array of a file that tells tokens from padding
_SEQUENCES, _TOP_K = 16, 2


def main(argv: Sequence[str]) -> int:
    """Prints the table and its warnings. Exit codes: 0, also with warnings; 2 for bad input."""
    try:
        arguments = _parser().parse_args(list(argv))
    except SystemExit as stop:  # argparse has printed why, or the help
        return int(stop.code or 0)
    try:
        _check(arguments)
        from routerlab.analysis.audit_loss import audit

        sums, source = _of_run(arguments) if arguments.run else _of_file(arguments)
        found = audit(sums)
        if arguments.json is not None:
            written = {"source": source} | found.as_dict()
            arguments.json.write_text(json.dumps(written, indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"routerlab audit-loss: {error}", file=sys.stderr)
        return 2
    _show(found, source)
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "The load-balancing rules of several frameworks on the same routing."
    parser = argparse.ArgumentParser(prog="routerlab audit-loss", description=about)
    source = parser.add_mutually_exclusive_group(required=True)
    add = source.add_argument
    add("--logits", type=Path, metavar="FILE", help=".npy, .npz or .safetensors: [L, T, E], or "
        f"[T, E] arrays by layer name; tokens where {MASK!r} is 0 are padding")  # fmt: skip
    add("--run", metavar="DIR", help="a run: its newest checkpoint on validation text")
    add = parser.add_argument
    add("--top-k", type=int, metavar="K", help=f"picks a token (with --logits, default {_TOP_K})")
    add("--sequences", type=int, metavar="N", help=f"with --run, default {_SEQUENCES}")
    add("--micro-batches", type=int, default=1, metavar="M", help="cut the batch in M (default 1)")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.run and arguments.top_k is not None:
        raise ValueError("--top-k is for --logits: a run's own picks are counted")
    if arguments.logits and arguments.sequences is not None:
        raise ValueError("--sequences is for --run")
    for name in ("micro_batches", "sequences"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be at least 1")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise ValueError(f"--json={arguments.json}: its folder does not exist")


def _of_file(arguments: argparse.Namespace) -> "tuple[RoutingSums, str]":
    from routerlab.analysis.balancing_rules import RoutingSums, records_of_logits

    names, logits, valid = read_logits(arguments.logits)
    top_k = _TOP_K if arguments.top_k is None else arguments.top_k
    records = records_of_logits(logits, top_k, names, valid, arguments.micro_batches)
    return RoutingSums.of(records), str(arguments.logits)


def read_logits(path: Path) -> "tuple[list[str], Tensor, Tensor | None]":
    """Layer names in the order of depth, logits [L, T, E], and which tokens are real [T].

    Raises:
        ValueError: what the file holds is not one [L, T, E] array, nor [T, E] arrays of one shape.
    """
    import torch

    arrays = _arrays(path)
    mask = arrays.pop(MASK, None)
    if not arrays:
        raise ValueError(f"{path}: holds no logits")
    for name, array in arrays.items():
        if not array.is_floating_point():
            raise ValueError(f"{path}: {name or 'the array'} is {array.dtype}, not floating point")
    names = sorted(arrays, key=_by_number)
    shapes = {name: tuple(arrays[name].shape) for name in names}
    if len(names) == 1 and arrays[names[0]].ndim == 3:
        logits = arrays[names[0]]
        names = [f"layers.{i:02d}" for i in range(len(logits))]
    elif {len(shape) for shape in shapes.values()} == {2} and len({*shapes.values()}) == 1:
        logits = torch.stack([arrays[name] for name in names])
        names = [name or "layers.00" for name in names]
    else:
        found = ", ".join(f"{name or 'array'} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{path}: needs one [L, T, E] array or [T, E] arrays alike, has {found}")
    if not logits.numel():
        raise ValueError(f"{path}: is empty, {list(logits.shape)}")
    if mask is not None and mask.numel() != logits.shape[1]:
        raise ValueError(f"{path}: {MASK} {list(mask.shape)} is not of {logits.shape[1]} tokens")
    return names, logits, None if mask is None else mask.flatten() != 0


def _arrays(path: Path) -> "dict[str, Tensor]":
    import numpy as np
    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(file[name]) for name in file.files}
        if path.suffix == ".npy":
            return {"": torch.from_numpy(np.load(path, allow_pickle=False))}
    except Exception as error:  # each library has its own for a file that is broken
        raise ValueError(f"{path}: cannot be read: {error}") from error
    raise ValueError(f"{path}: must end in .npy, .npz or .safetensors")


def _by_number(name: str) -> list[tuple[int, str]]:
    """A sorting key that puts layer_2 before layer_10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def _of_run(arguments: argparse.Namespace) -> "tuple[RoutingSums, str]":
    """The picks of a run's own routers; a micro-batch is one forward pass."""
    import torch
    from torch.utils.data import default_collate

    from routerlab.analysis.balancing_rules import RoutingSums
    from routerlab.training import assemble
    from routerlab.training.evaluate import load_objective
    from routerlab.training.run_directory import RunDirectory

    assemble.quiet()
    run = RunDirectory.existing(arguments.run)
    objective, data, path = load_objective(run)
    objective.eval()
    data.use_final_windows()
    dataset: Any = data.val_dataloader().dataset
    count = min(arguments.sequences or _SEQUENCES, len(dataset))
    pieces = arguments.micro_batches
    if count % pieces:
        raise ValueError(f"--micro-batches={pieces}: must divide the {count} sequences")
    items = [dataset[i * len(dataset) // count] for i in range(count)]  # of all domains
    step, records = int(path.stem.removeprefix("step_")), []
    progress = min(1.0, step / run.config.trainer.max_steps)  # of training, which schedules read
    with torch.no_grad():
        for i in range(pieces):
            batch = default_collate(items[i::pieces])
            context = replace(objective.context(batch, step, i), progress=progress)
            records.append(objective.backbone(batch["input_ids"], context).router_outputs)
    return RoutingSums.of(records), str(path)


def _show(found: "Audit", source: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)  # names may hold brackets
    pieces = f", {found.micro_batches} micro-batches" if found.micro_batches > 1 else ""
    console.print(
        f"{source}\n{len(found.layers)} layers, {found.num_tokens} tokens, {found.num_experts} "
        f"experts, {found.top_k:.4g} picks a token{pieces}",
        soft_wrap=True,
    )
    shape: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": 0, "pad_edge": False}
    rules = Table("rule", "picks", "tokens", "layers", **shape)
    for column in ("value", "at balance", "ratio", "hides"):
        rules.add_column(column, justify="right")
    for row in found.rules:
        how = (row.rule.picks, row.rule.tokens, row.rule.layers)
        figures = (f"{row.value:.4g}", f"{row.at_balance:.4g}", f"{row.normalized:.3f}")
        rules.add_row(row.rule.name, *how, *figures, str(len(row.hides) or ""))
    console.print(rules)
    console.print("alpha_ours = alpha_theirs x value at balance\n")
    layers = Table("layer", **shape)
    for column in ("ours", "first picks", "max violation", "dead", "effective", ""):
        layers.add_column(column, justify="right")
    for layer in found.layers:
        state = "collapsed" if layer.collapsed else "unbalanced" if layer.unbalanced else ""
        figures = (layer.value, layer.first_pick_value, layer.max_violation)
        row = (*(f"{x:.3f}" for x in figures), str(layer.dead_experts))
        layers.add_row(layer.name, *row, f"{layer.effective_experts:.2f}", state)
    console.print(layers)
    for text in found.warnings:
        console.print(f"warning: {text}", style="yellow", soft_wrap=True)
    for text in found.notes:
        console.print(f"note: {text}", soft_wrap=True)
