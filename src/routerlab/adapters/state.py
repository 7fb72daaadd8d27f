"""What the layers of one adapted model share: what routers may know, and what they decided."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.ops.prompt_mean import prompt_mean


class RoutingState:
    """A plain object, one a model: hooks on the model open it before each forward pass.

    ``context`` is what the caller wants the next forward pass to be told; without it the pass is
    described by its own arguments (shape, ``attention_mask``, ``labels``, ``task_ids``).
    ``records`` are what the routers decided in the last pass, by the names of their layers.
    """

    def __init__(self) -> None:
        self.context: RoutingContext | None = None
        self.current: RoutingContext | None = None  # of the pass that runs, or is run again
        self.records: dict[str, RouterOutput] = {}
        self.layers: dict[str, Any] = {}
        self.task_ids: Tensor | None = None  # of `tasks`
        self.continues = False  # this pass goes on with cached tokens
        self.embeddings: dict[str, Tensor] = {}  # of prompts, for routers of whole sequences
        self.block_records: dict[str, RouterOutput] = {}
        self._recording = False
        self._handles: list[Any] = []

    def attach(self, model: nn.Module) -> None:
        """Registers the hooks on the base model, once."""
        if not self._handles:
            self._handles = [
                model.register_forward_pre_hook(self._open, with_kwargs=True),
                model.register_forward_hook(self._close, with_kwargs=True, always_call=True),
            ]

    def detach(self, model: nn.Module) -> None:
        """Removes the hooks and all else that was put on the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module in model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, _InContext):
                setattr(module, "_gradient_checkpointing_func", function.function)  # noqa: B010

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model starts without the last pass, whose tensors belong to a graph."""
        passing = {"context": None, "current": None, "records": {}, "block_records": {}}
        return self.__dict__ | passing | {"embeddings": {}, "continues": False}

    def keep(self, name: str, output: RouterOutput) -> None:
        """Keeps a record; not when a checkpointed layer runs again in the backward pass."""
        if self._recording:
            self.records[name] = output

    @contextmanager
    def tasks(self, task_ids: Int[Tensor, "B"]) -> Iterator[None]:
        """The tasks of the sequences in all forward passes inside, for example of ``generate``."""
        before, self.task_ids = self.task_ids, task_ids
        try:
            yield
        finally:
            self.task_ids = before

    def _open(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        task_ids = kwargs.pop("task_ids", self.task_ids)
        if self.context is None:
            context = _described(model, args, kwargs, task_ids)
        else:
            context = _completed(self.context, _inputs(args, kwargs), task_ids)
        self.continues = _past_length(kwargs) > 0
        self.current = context
        self.records, self.block_records, self._recording = {}, {}, True
        self._remember_contexts(model)
        return args, kwargs

    def _close(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        self.context, self.current, self._recording = None, None, False
        self.block_records = {}

    def _remember_contexts(self, model: nn.Module) -> None:
        """Lets checkpointed layers run again under the context that they first ran under, whatever
        other passes came between. Raises ValueError for reentrant checkpointing, under which
        records have no gradient.
        """
        for module in model.modules():
            function = vars(module).get("_gradient_checkpointing_func")
            if function is None or isinstance(function, _InContext):
                continue
            if getattr(function, "keywords", {}).get("use_reentrant", False):
                raise ValueError(
                    "use_reentrant=True: the records of routers would have no gradient; must be "
                    'activation_checkpointing_enable({"use_reentrant": False})'
                )
            setattr(module, "_gradient_checkpointing_func", _InContext(function, self))  # noqa: B010


class _InContext:
    """A checkpoint function that runs what it is given under the context of its first run."""

    def __init__(self, function: Callable[..., Any], state: RoutingState) -> None:
        self.function, self.state = function, state

    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        state = self.state
        return self.function(
            functools.partial(self._run, layer, state.current, state.continues), *args
        )

    def _run(
        self,
        layer: Callable[..., Any],
        context: RoutingContext | None,
        continues: bool,
        *args: Any,
    ) -> Any:
        state = self.state
        before = (state.current, state.continues, state.block_records)
        state.current, state.continues, state.block_records = context, continues, {}
        try:
            return layer(*args)
        finally:
            state.current, state.continues, state.block_records = before


def _described(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], task_ids: Tensor | None
) -> RoutingContext:
    """The context of a pass that nobody described: from the arguments of the model."""
    inputs = _inputs(args, kwargs)
    batch_size, length = inputs.shape[:2]
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    valid = _valid(mask, length, _past_length(kwargs))
    prompt = None
    if (labels := kwargs.get("labels")) is not None:
        prompt = (labels == -100) & ((labels != -100).cumsum(1) == 0)
        prompt = (prompt if valid is None else prompt & valid).reshape(-1)
    seed = int(torch.randint(2**31, ())) if model.training else 0
    context = RoutingContext(
        batch_size=batch_size,
        sequence_length=length,
        valid=None if valid is None else valid.reshape(-1),
        prompt=prompt,
        seed=seed,
        step_seed=seed,
    )
    return _completed(context, inputs, task_ids)


def _inputs(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Token ids [B S], or embeddings [B S D] where there are none."""
    inputs = args[0] if args else kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:
        raise ValueError("the adapted model was called without input_ids or inputs_embeds")
    return inputs


def _completed(context: RoutingContext, inputs: Tensor, task_ids: Tensor | None) -> RoutingContext:
    """The context with the vocabulary ids and the tasks that it does not tell itself."""
    if context.token_ids is None and inputs.ndim == 2:
        context = replace(context, token_ids=inputs.reshape(-1))
    if context.task_ids is None and task_ids is not None:
        task_ids = _for_batch(task_ids.to(inputs.device), context.batch_size)
        context = replace(context, task_ids=task_ids)
    return context


def _valid(mask: Any, length: int, past: int) -> Bool[Tensor, "B S"] | None:
    """Which of the last ``length`` tokens are real, from a 2-D mask, or a 4-D one of keys (or one
    for each kind of attention).
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return None
    if mask.ndim == 4:  # [B 1 queries keys]: the last token attends to all real ones
        if past:  # what goes on is real
            return None
        mask = mask[:, 0, -1, :length]
        mask = mask if mask.dtype == torch.bool else mask == 0
    valid = mask[:, -length:].bool()
    return None if bool(valid.all()) else valid


def _for_batch(task_ids: Tensor, batch_size: int) -> Tensor:
    """Task ids of the rows: of each sequence's beams, where there are more rows than sequences."""
    if batch_size % len(task_ids):
        raise ValueError(f"task_ids: {len(task_ids)} for a batch of {batch_size} sequences")
    return task_ids.repeat_interleave(batch_size // len(task_ids))


def _past_length(kwargs: dict[str, Any]) -> int:
    past = kwargs.get("past_key_values")
    return 0 if past is None or not hasattr(past, "get_seq_length") else int(past.get_seq_length())


def with_prompt_embedding(
    state: RoutingState, name: str, x: Tensor, context: RoutingContext
) -> RoutingContext:
    """The context with the mean of the prompt at a layer: of this pass, or in generation of the
    pass that read the prompt.
    """
    if state.continues:
        if name not in state.embeddings or len(state.embeddings[name]) != context.batch_size:
            raise ValueError(
                "granularity='sequence': the pass goes on with cached tokens whose prompt this "
                "model has not read (beams that change their number are not supported)"
            )
        return replace(context, sequence_embedding=state.embeddings[name])
    state.embeddings[name] = prompt_mean(x.detach(), context)
    return replace(context, sequence_embedding=state.embeddings[name])
