"""Finds, on a CPU, what would make the host wait for a GPU."""

import sys
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {  # their result, or its size, is known to the host only when the device is done
    "aten::_local_scalar_dense",  # item(), int(tensor), bool(tensor), `if tensor`
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_MASKS = ("aten::index", "aten::index_put", "aten::index_put_")  # boolean masks are searched
_COPIES = {"cpu", "numpy", "tolist", "new_tensor", "tensor", "as_tensor"}  # to and from the host


class WaitsForDevice(TorchDispatchMode):
    """Within it, ``found`` gets a line for every operation that would wait on a CUDA device: reads
    of values, sizes that depend on values, and blocking copies to or from the host.

    It watches what runs on this machine, so code that asks for ``x.device.type == "cpu"`` shows
    what it does there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._calls = _Calls(self.found)

    def __enter__(self) -> Self:
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._calls.__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, given = func.name().split(".")[0], kwargs or {}
        if name in _READS or (name in _MASKS and _searches_a_mask(name, *args)):
            self.found.append(f"{name} at {_place()}")
        if name == "aten::repeat_interleave" and given.get("output_size") is None:
            self.found.append(f"{name} without output_size at {_place()}")
        return func(*args, **given)


class _Calls(TorchFunctionMode):
    """Calls that leave no trace among the operations of a CPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in _COPIES:
            self.found.append(f"{func.__name__} at {_place()}")
        return func(*args, **(kwargs or {}))


def _searches_a_mask(name: str, values: Tensor, indices: Any, *rest: Any) -> bool:
    masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
    if name == "aten::index" or not masked:
        return masked
    return rest[0].numel() > 1  # one number is filled in


def _place() -> str:
    frame = sys._getframe()
    while frame is not None and "/src/routerlab/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "no line of routerlab"
    return f"{frame.f_code.co_filename.rpartition('/routerlab/')[2]}:{frame.f_lineno}"
