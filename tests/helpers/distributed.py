"""Run a function in several gloo processes on this machine."""

import io
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PRELOAD = ["torch.distributed", "routerlab.backbones.decoder", "routerlab.objectives.causal_lm"]


def run_distributed(
    function: Callable[..., Any],
    *args: Any,
    world_size: int,
    tmp_path: Path,
    timeout: float = 60.0,
) -> list[Any]:
    """``function(*args)`` of every rank, in rank order.

    ``function`` must be importable (module level). The processes do not have pytest's import hook,
    so routerlab runs there without jaxtyping's checks. The first real error is raised here.
    """
    context = get_context("forkserver")  # fork is unsafe after OpenMP, spawn takes seconds each
    context.set_forkserver_preload(_PRELOAD)
    store = tmp_path / f"store_{time.monotonic_ns()}"
    processes, ends = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_child, args=(theirs, store, rank, world_size, function, args), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    try:
        return _collect(ends, timeout)
    finally:
        for process, end in zip(processes, ends, strict=True):
            process.kill()
            process.join()
            end.close()


def as_torchrun() -> None:
    """In a process of `run_distributed`: has Lightning start no processes of its own."""
    rank, size = dist.get_rank(), dist.get_world_size()
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": size}
    place |= {"LOCAL_WORLD_SIZE": size, "TORCHELASTIC_RUN_ID": "test"}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ.update({key: str(value) for key, value in place.items()})


def _collect(ends: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while len(results) + len(errors) < len(ends):
        waiting = [e for i, e in enumerate(ends) if i not in results and i not in errors]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for end in ready:
            rank = ends.index(end)
            try:
                good, value = torch.load(io.BytesIO(end.recv_bytes()), weights_only=False)
            except EOFError:
                good, value = False, "the process died"
            (results if good else errors)[rank] = value
        if errors:  # the other ranks will soon fail too: which error is the cause?
            deadline = min(deadline, time.monotonic() + 2)
    for rank, error in sorted(errors.items(), key=lambda item: "onnection" in item[1]):
        raise RuntimeError(f"rank {rank}:\n{error}")
    if len(results) < len(ends):
        raise TimeoutError(f"ranks {sorted(set(range(len(ends))) - set(results))}: no answer")
    return [results[rank] for rank in range(len(ends))]


def _child(
    end: Connection,
    store: Path,
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    data = io.BytesIO()  # bytes, not shared memory: the process may be gone when they are read
    torch.save(answer, data)
    end.send_bytes(data.getvalue())
    end.close()
