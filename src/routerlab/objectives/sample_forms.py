"""The three ways to run M samples of a micro-batch: with one gradient of the router."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from routerlab.core.routing import RoutingContext
from routerlab.objectives.step import Batch

FORMS = ("replicated", "looped", "cheap")


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of the model, over one or several samples of a micro-batch: blocks of the
    same rows, one after the other.

    ``task_weight`` is what its task loss counts in the gradient; 0: it runs without gradients.
    """

    batch: Batch
    context: RoutingContext
    task_weight: float = 1.0

    @property
    def learns(self) -> bool:
        """Whether the task's gradient goes through this pass."""
        return self.task_weight > 0


def cut(form: str, batch: Batch, context: RoutingContext, num_samples: int) -> list[Pass]:
    """The passes of a micro-batch; the last of them learns, and is where the routers learn too.

    Sample m draws the same choices in every form, so all give the same router gradient and the
    same losses:

    - ``replicated``: one pass over M copies of the rows;
    - ``looped``: M passes, each with a backward pass of its own, so that memory holds one of them
      (and the small graphs of the routers);
    - ``cheap``: M - 1 samples in a pass without gradients, in which routers alone build a graph,
      and one sample with gradients. Everything but the routers learns from that one: unbiased, with
      more variance, for about (M + 1) / (2 M) of the time.
    """
    if num_samples == 1:
        return [Pass(batch, context)]

    def samples(first: int, count: int, task_weight: float = 1.0) -> Pass:
        return Pass(repeat(batch, count), replicate(context, first, count), task_weight)

    if form == "replicated":
        return [samples(0, num_samples)]
    if form == "looped":
        return [samples(sample, 1) for sample in range(num_samples)]
    return [samples(1, num_samples - 1, 0.0), samples(0, 1, float(num_samples))]


def repeat(batch: Batch, count: int) -> Batch:
    """The whole batch ``count`` times: block after block, not row after row."""
    if count == 1:
        return batch
    return {key: _blocks(value, count) for key, value in batch.items()}


def replicate(context: RoutingContext, first: int, count: int) -> RoutingContext:
    """The context of samples ``first``, ``first + 1``, ... of its batch, as `repeat` lays them."""
    tensors = {}
    for field in fields(context):
        value = getattr(context, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = _blocks(value, count)
    size = context.batch_size * count
    return replace(context, **tensors, batch_size=size, replica=first, num_replicas=count)


def flat(pieces: Sequence[Sequence[Pass]]) -> list[Pass]:
    """The passes of all micro-batches."""
    return [one for passes in pieces for one in passes]


def _blocks(value: Tensor, count: int) -> Tensor:
    return value.repeat(count, *[1] * (value.ndim - 1))
