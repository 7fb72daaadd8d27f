"""``routerlab doctor``: what this machine has, and whether routerlab works on it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str]) -> int:
    """Prints the machine's state and runs the self-test; 1 if a part of it fails."""
    if argv:
        from routerlab.core.config import ConfigError

        raise ConfigError(f"doctor takes no options, got {' '.join(argv)}")
    from rich.console import Console

    console = Console(highlight=False)
    for name, value in facts().items():
        console.print(f"[bold]{name:<16}[/bold]{value}", soft_wrap=True)
    failed = 0
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            outcome = f"[green]ok[/green]    {check()}"
        except Exception as error:  # the whole point: say which part does not work, and go on
            failed += 1
            outcome = f"[red]FAILED[/red] {type(error).__name__}: {error}"
        console.print(f"{name:<48}{outcome} ({time.perf_counter() - start:.1f} s)", soft_wrap=True)
    return 1 if failed else 0


def facts() -> dict[str, Any]:
    """Versions, devices, dispatch paths, data and tracking, as text."""
    import torch

    from routerlab.core.config import compose, config_dir
    from routerlab.training.environment import environment
    from routerlab.training.tracking import wandb_mode

    found, cfg = environment(), compose()
    hardware, cache = found["hardware"], Path(cfg.paths.cache_dir).expanduser()
    built = [p.parent.name for p in cache.glob("*/meta.json")]
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return {
        "python": found["python"],
        "packages": ", ".join(f"{k} {v}" for k, v in found["packages"].items()),
        "commit": found["commit"] or "not a checkout",
        "processor": f"{hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['memory_gib']} GiB, {found['torch_threads']} threads",
        "bf16": "in hardware; on a CPU it pays off for wide experts only (docs/performance.md)"
        if bf16
        else "emulated on this processor: slower than float32",
        "gpus": ", ".join(hardware["gpus"]) or "none",
        "dispatch": _dispatch(),
        "configs": config_dir(),
        "data": f"{len(built)} prepared corpora in {cache}" if built else f"none yet in {cache}",
        "wandb": wandb_mode(),
    }


def _dispatch() -> str:
    """What `dispatch=auto` chooses, and what other packages bring."""
    import importlib.util

    from routerlab.dispatch.fused import BF16_FROM, BLOCKS_FROM
    from routerlab.dispatch.kernels import BACKENDS

    found = [name for name, b in BACKENDS.items() if importlib.util.find_spec(b.package)]
    return (
        f"auto: grouped products, on a CPU blocks in float32 from {BLOCKS_FROM:,} rows x D x F an "
        f"expert, and bf16 from {BF16_FROM:,}; kernels of other packages: "
        f"{', '.join(found) or 'none installed'}"
    )


def check_dispatch() -> str:
    """The fast path equals the loop, in values and gradients."""
    import torch

    from routerlab.moe.layer import DISPATCHES, MoE
    from routerlab.routers.build import build_router

    torch.manual_seed(0)
    router = build_router("token_choice", d_model=64, num_experts=8)
    layer = MoE(64, 96, 8, router, num_shared_experts=1)
    x = torch.randn(512, 64)
    found = {}
    for name in ("loop", "auto"):
        layer.dispatch = DISPATCHES[name]()
        layer.zero_grad()
        y, _ = layer(x)
        y.square().mean().backward()
        found[name] = [y.detach(), *(_grad(p) for p in layer.parameters())]
    pairs = zip(found["loop"], found["auto"], strict=True)
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    if worst > 1e-5:
        raise ArithmeticError(f"relative difference {worst:.1e}")
    return f"largest relative difference {worst:.1e}"


def check_micro_batches() -> str:
    """A step cut into four micro-batches has the loss and the gradient of the whole step."""
    import torch

    from routerlab.objectives.step import split_batch

    found = []
    for pieces in (1, 4):
        objective = _objective(f"objective.micro_batches={pieces}")
        torch.manual_seed(0)
        ids = torch.randint(0, 256, (8, 33))
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        parts = split_batch(batch, pieces)
        contexts = [objective.context(part, 0, i) for i, part in enumerate(parts)]
        terms, *_ = objective.accumulate(parts, contexts, due=False)
        grads = torch.cat([_grad(p).flatten() for p in objective.parameters()])
        found.append((terms["loss"], grads))
    (one, g1), (four, g4) = found
    worst = max(abs(one - four) / one, float((g1 - g4).norm() / g1.norm()))
    if worst > 1e-4:
        raise ArithmeticError(f"relative difference {worst:.1e}")
    return f"largest relative difference {worst:.1e}"


def check_learning() -> str:
    """A small routed model learns to continue a pattern, and no expert dies."""
    import torch

    objective = _objective()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    ids = torch.arange(64).repeat(16, 1) * torch.tensor([1, 3, 5, 7]).repeat(4)[:, None] % 64
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    losses, layers = [], {}
    for step in range(60):
        optimizer.zero_grad()
        context = objective.context(batch, step, 0)
        terms, sums, _ = objective.accumulate([batch], [context], due=True)
        optimizer.step()
        losses.append(terms["task"])
        layers = sums.values()
    dead = sum(float(layer["dead_experts"]) for layer in layers.values())
    if not losses[-1] < losses[0] / 4 or dead:
        raise ArithmeticError(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, {dead:.0f} dead experts")
    return f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps"


CHECKS: dict[str, Callable[[], str]] = {
    "fast dispatch equals the loop": check_dispatch,
    "micro-batches change neither loss nor gradient": check_micro_batches,
    "a routed model learns": check_learning,
}


def _objective(*overrides: str) -> Any:
    import torch

    from routerlab.core.config import compose
    from routerlab.training.assemble import build_objective

    torch.manual_seed(0)
    return build_objective(compose("backbone.d_model=64", "backbone.num_layers=2", *overrides))


def _grad(parameter: Any) -> Any:
    return parameter.grad.detach().clone()
