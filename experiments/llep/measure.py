"""One MoE layer on real processes, plain and least-loaded: measured.csv.

python experiments/llep/measure.py [--processes 2 4] [--rounds 7]

Forward and backward of a layer whose experts are spread over gloo processes of this machine, a
thread each. Each round times both dispatches in turn; a row has the medians of the slowest
process, by the clock on the wall and by the CPU time of its process: the second is what the layer
would take if every process had a core of its own and exchange were free.
"""

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from routerlab.analysis.expert_parallel.loads import hot_loads, zipf_loads
from routerlab.core.routing import RouterOutput
from routerlab.dispatch.expert_parallel import ExpertParallel
from routerlab.dispatch.least_loaded import LeastLoaded
from routerlab.experts.swiglu import SwiGLU
from routerlab.ops.least_loaded import plan_ep, plan_llep

HERE = Path(__file__).resolve().parent
D_MODEL, D_FF, NUM_EXPERTS, TOP_K, TOKENS = 256, 512, 8, 2, 2048
MIN_TOKENS = 64
CASES: dict[str, tuple[float, int] | None] = {
    "balanced": None, "30% in 2": (0.3, 2), "50% in 1": (0.5, 1), "80% in 1": (0.8, 1),
    "95% in 1": (0.95, 1),
}  # fmt: skip
COLUMNS = (
    "processes", "cores", "case", "ep_imbalance", "llep_imbalance", "transfers",
    "ep_wall_ms", "llep_wall_ms", "wall_speedup", "ep_cpu_ms", "llep_cpu_ms", "cpu_speedup",
)  # fmt: skip


def main() -> int:
    """Measures every case; prints and writes a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    rows: list[dict[str, Any]] = []
    for processes in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "rows.pt"
            given = (processes, arguments.rounds, folder, found)
            multiprocessing.start_processes(work, given, nprocs=processes, start_method="spawn")
            rows += torch.load(found, weights_only=True)
    with (HERE / "measured.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


def work(rank: int, processes: int, rounds: int, folder: str, found: Path) -> None:
    """One process; the first writes the rows."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    torch.manual_seed(0)
    experts = SwiGLU(D_MODEL, D_FF, NUM_EXPERTS)
    dispatches = {"ep": ExpertParallel(), "llep": LeastLoaded(min_tokens=MIN_TOKENS)}
    dispatches["ep"].shard(experts, mesh)
    rows = []
    for case, hot in CASES.items():
        loads = zipf_loads(NUM_EXPERTS, TOKENS * TOP_K, 0.0)
        if hot is not None:
            loads = hot_loads(NUM_EXPERTS, TOKENS * TOP_K, *hot)
        times = timed(dispatches, experts, loads, rank, rounds)
        slowest = torch.tensor(times)  # [rounds, dispatch, clock]
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        medians = [[statistics.median(c) for c in zip(*d, strict=True)]
                   for d in slowest.transpose(0, 1).tolist()]  # fmt: skip
        if rank == 0:
            rows.append(row(case, [load * processes for load in loads], processes, medians))
            print(rows[-1], flush=True)
    if rank == 0:
        torch.save(rows, found)
    dist.barrier()
    dist.destroy_process_group()


def timed(
    dispatches: dict[str, ExpertParallel], experts: SwiGLU, loads: list[int], rank: int, rounds: int
) -> list[list[list[float]]]:
    """Milliseconds of this process, [rounds, dispatch, (wall, CPU)]; the first round is dropped."""
    generator = torch.Generator().manual_seed(rank)
    picks = torch.arange(NUM_EXPERTS).repeat_interleave(torch.tensor(loads))
    picks = picks[torch.randperm(len(picks), generator=generator)].view(TOKENS, TOP_K)
    scores = torch.full((TOKENS, NUM_EXPERTS), 1 / NUM_EXPERTS)
    weights = torch.full((TOKENS, TOP_K), 1 / TOP_K)
    output = RouterOutput.from_top_k(scores, scores, picks, weights)
    x = torch.randn(TOKENS, D_MODEL, generator=generator, requires_grad=True)
    times = []
    for _ in range(rounds + 1):
        times.append([])
        for dispatch in dispatches.values():
            experts.zero_grad()
            x.grad = None
            dist.barrier()
            start = time.perf_counter(), time.process_time()
            dispatch(x, output, experts).square().sum().backward()
            busy = time.process_time()
            dist.barrier()
            wall = time.perf_counter()
            times[-1].append([1e3 * (wall - start[0]), 1e3 * (busy - start[1])])
    return times[1:]


def row(case: str, loads: list[int], processes: int, medians: list[list[float]]) -> dict[str, Any]:
    """What is written."""
    ep, llep = plan_ep(loads, processes), plan_llep(loads, processes, min_tokens=MIN_TOKENS)
    (ep_wall, ep_cpu), (llep_wall, llep_cpu) = medians
    return {
        "processes": processes, "cores": os.cpu_count(), "case": case,
        "ep_imbalance": round(ep.imbalance, 3), "llep_imbalance": round(llep.imbalance, 3),
        "transfers": len(llep.transfers),
        "ep_wall_ms": round(ep_wall, 1), "llep_wall_ms": round(llep_wall, 1),
        "wall_speedup": round(ep_wall / llep_wall, 2),
        "ep_cpu_ms": round(ep_cpu, 1), "llep_cpu_ms": round(llep_cpu, 1),
        "cpu_speedup": round(ep_cpu / llep_cpu, 2),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
