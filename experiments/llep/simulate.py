"""Speed-up against imbalance, computed: results.csv and figure.png.

python experiments/llep/simulate.py [RUN ...]

RUN: runs whose recorded loads are simulated as well, named by their directories.
"""

import csv
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from routerlab.analysis.expert_parallel.loads import (
    apportion,
    hot_loads,
    recorded_loads,
    zipf_loads,
)
from routerlab.analysis.expert_parallel.machines import LAYERS, MACHINES, Machine
from routerlab.analysis.expert_parallel.methods import Knobs, simulate_layer

HERE = Path(__file__).resolve().parent
H200 = MACHINES["h200"]
SLOW_LAYER = replace(H200, layer_overhead=12e-3)  # see README.md
SHARES, HOT = (0.3, 0.5, 0.8, 0.95), (16, 4, 1)
# arXiv 2601.17111, figure 1: speed-ups on 8 H200 by share, then number of hot experts.
PAPER = {
    "gpt-oss-120b": (32768, 1.07, [
        (1.73, 2.09, 2.41), (2.85, 3.05, 3.48), (4.37, 4.47, 5.26), (5.19, 5.22, 6.11)]),
    "deepseek-v3": (16384, 0.92, [
        (1.69, 1.76, 1.96), (2.65, 2.83, 2.77), (3.83, 3.64, 4.23), (4.59, 4.64, 5.13)]),
    "kimi-k2": (16384, 1.03, [
        (1.80, 1.94, 1.48), (2.73, 2.85, 2.74), (4.01, 3.96, 4.09), (4.83, 4.67, 5.03)]),
}  # fmt: skip
COLUMNS = (
    "part", "model", "case", "devices", "tokens", "alpha", "min_tokens", "threshold", "method",
    "imbalance", "transfers", "milliseconds", "memory_gb", "speedup", "paper", "slow_layer_speedup",
)  # fmt: skip
Row = dict[str, Any]


def main(runs: list[Path]) -> int:
    """Computes every part; prints what README.md quotes."""
    rows = [*paper(), *devices(), *knobs()]
    rows += [row for run in runs for row in recorded(run)]
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    compared = [row for row in rows if "paper" in row and row["case"] != "balanced"]
    for key in ("speedup", "slow_layer_speedup"):
        off = [row[key] / row["paper"] - 1 for row in compared]
        size = statistics.mean(abs(x) for x in off)
        print(f"{key}: off by {min(off):+.2f} to {max(off):+.2f}, mean size {size:.2f}")
    print("order of the 12 cases as in the paper:", {m: ranks_agree(compared, m) for m in PAPER})
    draw(rows)
    return 0


def simulated(
    part: str, model: str, case: str, loads: list[int], group: int, tokens: int,
    used: Knobs, machine: Machine = H200, expected: list[int] | None = None,
) -> list[Row]:  # fmt: skip
    """A row for each method."""
    shape = replace(LAYERS[model], num_experts=len(loads))
    costs = simulate_layer(loads, shape, group, machine, used, expected=expected)
    about = {"part": part, "model": model, "case": case, "devices": group, "tokens": tokens}
    about |= {"alpha": used.alpha, "min_tokens": used.min_tokens, "threshold": used.threshold}
    return [
        about | {
            "method": method, "imbalance": round(cost.imbalance, 3), "transfers": cost.transfers,
            "milliseconds": round(1e3 * cost.seconds, 3),
            "memory_gb": round(cost.memory_bytes / 1e9, 2),
            "speedup": round(costs["ep"].seconds / cost.seconds, 3),
        }
        for method, cost in costs.items()
    ]  # fmt: skip


def paper() -> Iterator[Row]:
    """The paper's three shapes and 13 cases, beside what it measured."""
    for model, (tokens, balanced, measured) in PAPER.items():
        experts, total = LAYERS[model].num_experts, tokens * LAYERS[model].top_k * 8
        cases = [("balanced", zipf_loads(experts, total, 0.0), balanced)]
        for share, line in zip(SHARES, measured, strict=True):
            for hot, value in zip(HOT, line, strict=True):
                loads = hot_loads(experts, total, share, hot)
                cases.append((f"{share:.0%} in {hot}", loads, value))
        for case, loads, value in cases:
            slow = simulated("paper", model, case, loads, 8, tokens, Knobs(), SLOW_LAYER)
            for row, other in zip(
                simulated("paper", model, case, loads, 8, tokens, Knobs()), slow, strict=True
            ):
                if row["method"] != "ep":
                    row["slow_layer_speedup"] = other["speedup"]
                if row["method"] == "llep":
                    row["paper"] = value
                if row["method"] == "llep" or case != "balanced":
                    yield row


def devices() -> Iterator[Row]:
    """Groups of 8 devices, a node, to one device an expert, with and without a network between."""
    model, tokens = "gpt-oss-120b", 32768
    for group in (8, 16, 32, 64, 128):
        total = tokens * LAYERS[model].top_k * group
        for case, loads in (
            ("balanced", zipf_loads(128, total, 0.0)), ("zipf 0.5", zipf_loads(128, total, 0.5)),
            ("zipf 1", zipf_loads(128, total, 1.0)), ("80% in 4", hot_loads(128, total, 0.8, 4)),
        ):  # fmt: skip
            yield from simulated("devices", model, case, loads, group, tokens, Knobs())
            one_node = replace(H200, devices_per_node=group)
            yield from simulated(
                "devices, one node", model, case, loads, group, tokens, Knobs(), one_node
            )


def knobs() -> Iterator[Row]:
    """Alpha, m and lambda, at batches from large to small."""
    model = "gpt-oss-120b"
    tried = [Knobs(alpha=alpha) for alpha in (1.0, 1.1, 1.2, 1.5, 2.0)]
    tried += [Knobs(min_tokens=m) for m in (1, 256, 4096, 16384, 65536)]
    tried += [Knobs(threshold=threshold) for threshold in (None, 1.1, 2.0, 3.0)]
    for tokens in (512, 2048, 8192, 32768):
        total = tokens * LAYERS[model].top_k * 8
        for case, loads in (
            ("zipf 0.5", zipf_loads(128, total, 0.5)), ("30% in 4", hot_loads(128, total, 0.3, 4)),
            ("80% in 4", hot_loads(128, total, 0.8, 4)),
        ):  # fmt: skip
            for used in tried:
                rows = simulated("knobs", model, case, loads, 8, tokens, used)
                yield from (row for row in rows if row["method"] == "llep")


def recorded(run: Path) -> Iterator[Row]:
    """Means over all recorded steps and layers of a run, in layers of OLMoE's width. Replication is
    placed by the record before, or knows the batch.
    """
    model, tokens = "olmoe-1b-7b", 16384
    layers = recorded_loads(run)
    experts = len(next(iter(next(iter(layers.values())).values())))
    for group in (size for size in (8, 32, 64) if not experts % size):
        found: dict[str, list[Row]] = {}
        for steps in layers.values():
            total = tokens * LAYERS[model].top_k * group
            loads = [apportion(shares, total) for shares in steps.values()]
            for before, now in zip(loads, loads[1:], strict=False):
                for knew, expected in (("", before), (", foreseen", None)):
                    for row in simulated(
                        "recorded", model, run.name, now, group, tokens, Knobs(), H200, expected
                    ):
                        if row["method"] == "replication" or not knew:
                            found.setdefault(row["method"] + knew, []).append(row)
        base = statistics.mean(row["milliseconds"] for row in found["ep"])
        for method, rows in found.items():
            means = {
                key: round(statistics.mean(row[key] for row in rows), 3)
                for key in ("imbalance", "transfers", "milliseconds", "memory_gb")
            }
            speedup = {"method": method, "speedup": round(base / means["milliseconds"], 3)}
            yield rows[0] | means | speedup


def ranks_agree(rows: list[Row], model: str) -> float:
    """Spearman's correlation of the computed and the measured speed-ups."""
    own = [row for row in rows if row["model"] == model]
    ranks = [
        [sorted(row[key] for row in own).index(row[key]) for row in own]
        for key in ("speedup", "paper")
    ]
    return round(statistics.correlation(*ranks), 2)


def draw(rows: list[Row]) -> None:
    """Computed against measured speed-up, and speed-up by the size of the group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for model in PAPER:
        own = [r for r in rows if (r["part"], r["model"], r["method"]) == ("paper", model, "llep")]
        left.scatter([r["speedup"] for r in own], [r["paper"] for r in own], s=18, label=model)
    left.plot([0.8, 7], [0.8, 7], color="grey", linewidth=0.8)
    left.set(xlabel="computed speed-up", ylabel="measured in the paper", title="8 x H200")
    left.legend(frameon=False)
    for case, colour in (("zipf 0.5", "C0"), ("zipf 1", "C1"), ("80% in 4", "C2")):
        for part, style in (("devices", "-"), ("devices, one node", "--")):
            own = [r for r in rows if (r["part"], r["case"], r["method"]) == (part, case, "llep")]
            where = "nodes of 8" if part == "devices" else "one node"
            right.plot([r["devices"] for r in own], [r["speedup"] for r in own], style,
                       color=colour, marker=".", label=f"{case}, {where}")  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="devices of a group", ylabel="computed speed-up",
              title="gpt-oss-120b, LLEP over EP")  # fmt: skip
    right.set_xticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"], minor=False)
    right.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    right.set_yticks([], minor=True)
    right.set_ylim(0.5, 25)
    right.legend(frameon=False, fontsize=8, loc="lower right", ncol=2)
    figure.savefig(HERE / "figure.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main([Path(word).resolve() for word in sys.argv[1:]]))
