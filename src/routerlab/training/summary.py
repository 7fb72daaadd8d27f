"""The headline of a run."""

from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table

from routerlab.objectives.routed import RoutedObjective
from routerlab.training.callbacks.metrics import Metrics
from routerlab.training.run_directory import RunDirectory

_LAYER = (
    "load_entropy", "max_violation", "mean_entropy", "entropy_of_mean", "mutual_information",
    "domain_information", "dead_experts", "experts_per_token", "uncovered_share",
)  # fmt: skip


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
    """What ``summary.json`` holds: validation beside n-gram baselines, every layer, the cost."""
    scalars, _ = objective.validation_result
    by_domain = "val/bits_per_byte/"
    backbone: Any = objective.backbone
    layers = [name.removesuffix(".moe") for name in backbone.layer_names]
    return {
        "name": run.name,
        "steps": trainer.global_step,
        "tokens": metrics.tokens,
        "train_seconds": metrics.train_seconds,
        "tokens_per_second": metrics.tokens / max(metrics.train_seconds, 1e-9),
        "parameters": backbone.count_parameters(),
        "looks_ahead": objective.looks_ahead,
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
        "domains": objective.domains,
        "num_experts": [layer.experts.num_experts for layer in backbone.moe_layers.values()],
        "top_k": getattr(next(iter(backbone.moe_layers.values())).router, "top_k", None),
        "layers": [
            {"layer": layer}
            | {
                name: scalars[f"val/router/{layer}/{name}"]
                for name in _LAYER
                if f"val/router/{layer}/{name}" in scalars
            }
            for layer in layers
        ],
    }


def print_headline(run: RunDirectory) -> None:
    """Prints the summary of a finished run."""
    summary, console = run.read_json("summary.json"), Console()
    table = Table(title="held-out bits per byte (lower is better)", title_justify="left")
    columns = {**summary["baselines"], "this model": summary["val"]["bits_per_byte"]}
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.3f}" for value in columns.values()))
    console.print(table)
    if (ahead := summary["looks_ahead"]) != "no":
        console.print(f"[bold red]{LOOKS_AHEAD[ahead]}")
    domains = summary["val"]["bits_per_byte_by_domain"]
    console.print("by domain: " + ", ".join(f"{k} {v:.3f}" for k, v in domains.items()))
    if summary["layers"]:
        console.print(_layer_table(summary["layers"]))
    dead = sum(layer.get("dead_experts", 0) for layer in summary["layers"])
    console.print(f"experts that died: {dead:.0f}" if dead else "experts that died: none")
    console.print(
        f"{summary['steps']} steps, {summary['tokens']:,} tokens in "
        f"{summary['train_seconds']:.0f} s ({summary['tokens_per_second']:,.0f} tokens/s); "
        f"{summary['parameters']['total']:,} parameters, {summary['parameters']['active']:,} active"
    )
    console.print(f"run    {run.path}", soft_wrap=True, highlight=False)
    console.print(f"report {run.path / 'report.html'}", soft_wrap=True, highlight=False)


_COLUMNS = {
    "load_entropy": "load\nentropy",
    "max_violation": "max\nviolation",
    "mean_entropy": "token\nentropy",
    "mutual_information": "mutual\ninfo",
    "domain_information": "domain\ninfo",
    "dead_experts": "dead\nexperts",
}


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    table = Table("layer", title="routing on held-out text", title_justify="left")
    names = [name for name in _COLUMNS if name in layers[0]]
    for name in names:
        table.add_column(_COLUMNS[name], justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(layer["layer"], *(f"{layer[name]:.3g}" for name in names))
    return table
