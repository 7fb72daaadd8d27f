"""What a step allocates, and what forward keeps for backward."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def peak_mib(work: Callable[[], object], device: torch.device) -> float:
    """The most memory that ``work`` holds at one time, over what was held before it.

    On CPU from the profiler's allocation events: PyTorch's allocator reports every block it hands
    out, also the temporaries inside an operation, which a dispatch mode would not see. Exact, and
    two to three times as slow as the step itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else two lines on stderr for every profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    return highest(_allocations(profiler)) / MIB


def highest(changes: Iterable[int]) -> int:
    """The highest running sum, from 0."""
    held = most = 0
    for change in changes:
        held += change
        most = max(most, held)
    return most


def _allocations(profiler: Any) -> list[int]:
    """Bytes of each allocation (above 0) and release (below), in the order of time."""
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def saved_mib(forward: Callable[[], object], parameters: Iterable[Tensor]) -> float:
    """What autograd saves during ``forward``: distinct storages that hold no parameter."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # alive until the end: a freed storage's address could come again
    del kept
    return sum(saved.values()) / MIB


def live_saved_mib(work: Callable[[], object], parameters: Iterable[Tensor]) -> float:
    """The most that autograd keeps at one time during ``work``, which may run backward itself, and
    more than once: distinct storages that hold no parameter.
    """
    ledger = _Ledger({parameter.untyped_storage().data_ptr() for parameter in parameters})
    with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda kept: kept.tensor):
        work()
    return ledger.most / MIB


class _Ledger:
    """Which storages autograd holds, how often, and the most bytes so far."""

    def __init__(self, own: set[int]) -> None:
        self.own, self.holders, self.held, self.most = own, dict[int, int](), 0, 0

    def pack(self, tensor: Tensor) -> "_Kept":
        """What autograd keeps in the place of ``tensor``."""
        kept = _Kept(tensor.detach(), self)
        if kept.place not in self.own:
            if not self.holders.get(kept.place):
                self.held += kept.size
                self.most = max(self.most, self.held)
            self.holders[kept.place] = self.holders.get(kept.place, 0) + 1
        return kept

    def release(self, kept: "_Kept") -> None:
        """A saved tensor is no longer needed."""
        if kept.place not in self.own:
            self.holders[kept.place] -= 1
            if not self.holders[kept.place]:
                self.held -= kept.size


class _Kept:
    """A saved tensor that tells its ledger when autograd lets it go."""

    def __init__(self, tensor: Tensor, ledger: _Ledger) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.ledger = tensor, ledger
        self.place, self.size = storage.data_ptr(), storage.nbytes()

    def __del__(self) -> None:
        self.ledger.release(self)
