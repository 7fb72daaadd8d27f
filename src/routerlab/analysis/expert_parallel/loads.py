"""Loads of the experts of a layer: synthetic ones, and those that runs of ours recorded."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from routerlab.core.checks import within
from routerlab.core.config import ConfigError

_NAME, _END = "router/", "/expert_load"


@dataclass(frozen=True)
class Case:
    """The balance of a layer of E experts, for any number of assignments."""

    name: str
    num_experts: int
    loads: Callable[[int], list[int]]  # assignments -> loads [E] that add up to it
    expected: Callable[[int], list[int]] | None = None  # what was known before the batch


def apportion(shares: Sequence[int | float], total: int) -> list[int]:
    """``total`` assignments in the proportion of ``shares``: whole numbers that add up to it, by
    largest remainders (ties: the lower number first).
    """
    whole = sum(shares)
    if not shares or min(shares) < 0 or not 0 < whole < float("inf"):
        raise ConfigError(f"shares={list(shares)}: must be at least 0, and not all 0")
    exact = [share * total / whole for share in shares]
    loads = [int(value) for value in exact]
    by_remainder = sorted(range(len(loads)), key=lambda i: (loads[i] - exact[i], i))
    for i in by_remainder[: total - sum(loads)]:
        loads[i] += 1
    return loads


def hot_loads(num_experts: int, total: int, share: int | float, num_hot: int) -> list[int]:
    """``share`` of all assignments evenly on experts 0 to ``num_hot`` - 1, the rest evenly on the
    others: neighbours are hot together, as in the study of LLEP (arXiv 2601.17111, figure 1).
    """
    within("share", share, 0, 1)
    within("num_hot", num_hot, 1, num_experts - 1)
    hot = apportion([1] * num_hot, round(share * total))
    return hot + apportion([1] * (num_experts - num_hot), total - sum(hot))


def zipf_loads(num_experts: int, total: int, exponent: int | float, seed: int = 0) -> list[int]:
    """The expert of rank r takes a share proportional to r^-exponent; which expert has which rank
    is drawn from ``seed``. An exponent of 0 is balance.
    """
    within("exponent", exponent, 0)
    loads = apportion([rank**-exponent for rank in range(1, num_experts + 1)], total)
    random.Random(seed).shuffle(loads)
    return loads


def recorded_loads(run: str | Path) -> dict[str, dict[int, list[float]]]:
    """Each layer's shares of load [E] at every step of which a run's ``distributions.jsonl`` tells,
    in the order of depth and of time; lines that a kill tore are left out.

    Raises:
        ConfigError: the run recorded no loads (``diagnostic`` without ``expert_load``).
    """
    path = Path(run) / "distributions.jsonl"
    if not path.is_file():
        raise ConfigError(f"{str(run)!r}: holds no run with distributions.jsonl")
    found: dict[str, dict[int, list[float]]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step, name, value = int(row["step"]), row["name"], row["value"]
        except (ValueError, KeyError, TypeError):
            continue
        if name.startswith(_NAME) and name.endswith(_END):
            layer = name.removeprefix(_NAME).removesuffix(_END)
            found.setdefault(layer, {})[step] = value
    if not found:
        raise ConfigError(f"{str(path)!r}: holds no expert_load of a training step")
    return {layer: dict(sorted(found[layer].items())) for layer in sorted(found)}


def trace_loads(path: str | Path) -> dict[str, list[int]]:
    """Each layer's assignments by expert [E] in a trace, or in the one of a run."""
    from routerlab.analysis import trace  # imports torch

    layers = trace.load(path).layers
    return {
        name: layer.expert_indices.bincount(minlength=layer.num_experts).tolist()
        for name, layer in layers.items()
    }


def hot_case(num_experts: int, share: int | float, num_hot: int) -> Case:
    """`hot_loads`."""
    name = f"hot {share:g}:{num_hot}"
    return Case(name, num_experts, lambda total: hot_loads(num_experts, total, share, num_hot))


def zipf_case(num_experts: int, exponent: int | float) -> Case:
    """`zipf_loads`."""
    name = f"zipf {exponent:g}" if exponent else "balanced"
    return Case(name, num_experts, lambda total: zipf_loads(num_experts, total, exponent))


def run_cases(run: str | Path) -> list[Case]:
    """The last recorded training step of each layer; the record before it is what was expected."""
    cases = []
    for layer, steps in recorded_loads(run).items():
        *before, last = (partial(apportion, shares) for shares in steps.values())
        name, experts = f"{layer}, step {max(steps)}", len(steps[max(steps)])
        cases.append(Case(name, experts, last, before[-1] if before else None))
    return cases


def trace_cases(path: str | Path) -> list[Case]:
    """Each layer of a trace."""
    return [
        Case(layer, len(counts), partial(apportion, counts))
        for layer, counts in trace_loads(path).items()
    ]
