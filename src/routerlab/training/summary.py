"""The headline of a run."""

import math
import shlex
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

from routerlab.analysis.flops import forward_flops
from routerlab.objectives.routed import RoutedObjective
from routerlab.objectives.step import Batch, all_reduce
from routerlab.training.assemble import has_tasks
from routerlab.training.callbacks.metrics import Metrics
from routerlab.training.recording import sequences
from routerlab.training.run_directory import RunDirectory
from routerlab.training.task_results import print_accuracies, print_alignment, task_results

_LAYER = (
    "load_entropy", "max_violation", "mean_entropy", "entropy_of_mean", "mutual_information",
    "domain_information", "dead_experts", "experts_per_token", "uncovered_share",
    "ess_min", "ess_mean", "ess_p05", "probs_ess_min", "probs_ess_mean", "probs_ess_p05",
)  # fmt: skip


_COUNTED = 8  # sequences whose forward passes are counted
LOOKS_AHEAD = {
    "in training": (
        "Training looks ahead: routing depended on later tokens; the evaluation above does not."
    ),
    "in evaluation": (
        "This run leaks the future: routing depends on later tokens, in evaluation too. Its "
        "numbers are not those of a language model."
    ),
}


def summarize(
    run: RunDirectory,
    data: Any,
    objective: RoutedObjective,
    metrics: Metrics,
    trainer: pl.Trainer,
) -> dict[str, Any]:
    """What ``summary.json`` holds: validation beside baselines (n-grams; for tasks the base model
    and other runs), every layer, the cost.
    """
    scalars, _ = objective.validation_result
    backbone: Any = objective.backbone
    layers = list(backbone.moe_layers.values())
    results = task_results(run, scalars) if has_tasks(data) else _text_results(data, scalars)
    return {
        "name": run.name,
        "steps": trainer.global_step,
        "tokens": metrics.tokens,
        "train_seconds": metrics.train_seconds,
        "tokens_per_second": metrics.tokens / max(metrics.train_seconds, 1e-9),
        "parameters": backbone.count_parameters(),
        "flops_per_token": flops_per_token(data, objective),
        "looks_ahead": objective.looks_ahead,
        **results,
        "domains": objective.domains,
        "num_experts": [layer.experts.num_experts for layer in layers],
        "top_k": getattr(layers[0].router, "top_k", None) if layers else None,
        "layers": [_layer(name, scalars) for name in backbone.layer_names],
    }


def flops_per_token(data: Any, objective: RoutedObjective) -> float | None:
    """`forward_flops` for each token of some held-out sequences, without padding: the mean over
    processes, all of which must ask. None, with a warning, where the model does not let them be
    counted.
    """
    batch = {name: value.to(objective.device) for name, value in sequences(data, _COUNTED).items()}
    flops, tokens = 0.0, 0
    try:
        for part in _without_padding(batch):
            context = objective.context(part, objective.global_step, 0)
            with objective.precision():
                flops += forward_flops(objective.backbone, part["input_ids"], context)
            tokens += part["input_ids"].numel()
    except Exception as error:  # the run itself matters more
        warnings.warn(
            f"flops_per_token: not counted ({type(error).__name__}: {error})", stacklevel=1
        )
        flops = math.nan
    sums = torch.tensor([flops, tokens], dtype=torch.float64, device=objective.device)
    flops, tokens = all_reduce(sums).tolist()
    return None if math.isnan(flops) else flops / tokens


def _without_padding(batch: Batch) -> list[Batch]:
    """The batch if nothing is padded, else each sequence alone."""
    if "valid" not in batch:
        return [batch]
    rows = [
        {name: value[i : i + 1] for name, value in batch.items()}
        for i in range(len(batch["valid"]))
    ]
    return [{k: v[:, row["valid"][0]] if v.ndim > 1 else v for k, v in row.items()} for row in rows]


def _text_results(data: Any, scalars: dict[str, float]) -> dict[str, Any]:
    by_domain = "val/bits_per_byte/"
    return {
        "val": {
            "loss": scalars["val/loss"],
            "bits_per_byte": scalars["val/bits_per_byte"],
            "bits_per_byte_by_domain": {
                key.removeprefix(by_domain): value
                for key, value in scalars.items()
                if key.startswith(by_domain)
            },
        },
        "baselines": {
            name: values["all"] for name, values in data.corpus.meta["ngram_bits_per_byte"].items()
        },
    }


def _layer(name: str, scalars: dict[str, float]) -> dict[str, Any]:
    layer = name.removesuffix(".moe")
    keys = {metric: f"val/router/{layer}/{metric}" for metric in _LAYER}
    return {"layer": layer} | {m: scalars[key] for m, key in keys.items() if key in scalars}


def print_headline(run: RunDirectory) -> None:
    """Prints the summary of a finished run."""
    summary, console = run.read_json("summary.json"), Console()
    if "accuracy" in summary["val"]:
        print_accuracies(summary, console)
        print_alignment(summary, console)
    else:
        _print_bits(summary, console)
    if (ahead := summary["looks_ahead"]) != "no":
        console.print(f"[bold red]{LOOKS_AHEAD[ahead]}")
    if any(len(layer) > 1 for layer in summary["layers"]):
        console.print(_layer_table(summary["layers"]))
    counts = [layer["dead_experts"] for layer in summary["layers"] if "dead_experts" in layer]
    if counts:
        console.print(f"experts that died: {f'{sum(counts):.0f}' if sum(counts) else 'none'}")
    parameters = summary["parameters"]
    words = [f"{parameters['total']:,} parameters", f"{parameters['active']:,} active"]
    if parameters.get("trainable", parameters["total"]) != parameters["total"]:
        words.append(f"{parameters['trainable']:,} trainable")
    if flops := summary.get("flops_per_token"):
        words.append(f"{flops:,.0f} FLOPs a token")
    console.print(
        f"{summary['steps']} steps, {summary['tokens']:,} tokens in "
        f"{summary['train_seconds']:.0f} s ({summary['tokens_per_second']:,.0f} tokens/s); "
        + ", ".join(words)
    )
    console.print(f"run    {run.path}", soft_wrap=True, highlight=False)
    console.print(f"report {run.path / 'report.html'}", soft_wrap=True, highlight=False)
    if command := sync_command(run.path):
        console.print(f"upload {command}", soft_wrap=True, highlight=False, markup=False)


def sync_command(directory: Path) -> str | None:
    """What uploads the offline W&B runs of a run, its restarts and the runs inside it (baselines),
    once there is a key and a network; None if there is none.
    """
    folders = sorted({path.parent for path in directory.rglob("wandb/offline-run-*")})
    if not folders:
        return None
    return " ".join(
        ["wandb sync", *(f"{shlex.quote(str(path))}/offline-run-*" for path in folders)]
    )


def _print_bits(summary: dict[str, Any], console: Console) -> None:
    table = Table(title="held-out bits per byte (lower is better)", title_justify="left")
    columns = {**summary["baselines"], "this model": summary["val"]["bits_per_byte"]}
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.3f}" for value in columns.values()))
    console.print(table)
    domains = summary["val"]["bits_per_byte_by_domain"]
    console.print("by domain: " + ", ".join(f"{k} {v:.3f}" for k, v in domains.items()))


_COLUMNS = {
    "load_entropy": "load\nentropy",
    "max_violation": "max\nviolation",
    "mean_entropy": "token\nentropy",
    "mutual_information": "mutual\ninfo",
    "domain_information": "domain\ninfo",
    "dead_experts": "dead\nexperts",
}
_SUPPORT = {
    "load_entropy": "load\nentropy",
    "mean_entropy": "token\nentropy",
    "dead_experts": "dead\nexperts",
    "probs_ess_mean": "softmax\nESS",
    "ess_mean": "used\nESS",
}  # where it was measured
_MOST_ROWS = 16  # of the printed table of layers


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    """A row a layer; of a deep model the lowest, mean and highest value alone."""
    table = Table("layer", title="routing on held-out data", title_justify="left")
    columns = _SUPPORT if "ess_mean" in layers[0] else _COLUMNS
    names = [name for name in columns if all(name in layer for layer in layers)]
    for name in names:
        table.add_column(columns[name], justify="right", no_wrap=True)
    if len(layers) > _MOST_ROWS:
        values = {name: [layer[name] for layer in layers] for name in names}
        reduce = {"lowest": min, "mean": lambda v: sum(v) / len(v), "highest": max}
        layers = [
            {"layer": f"{word} of {len(layers)}"} | {name: f(v) for name, v in values.items()}
            for word, f in reduce.items()
        ]
    for layer in layers:
        table.add_row(layer["layer"], *(f"{layer[name]:.3g}" for name in names))
    return table
