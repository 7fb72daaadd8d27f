"""Whether routing depends on later tokens: what makes language-modelling numbers dishonest."""

from typing import Any

from torch import nn

from routerlab.objectives.scheduled import Scheduled

MARKS = ("no", "in training", "in evaluation")
_POINTS = 101  # of training progress, at which schedules are looked at


def looks_ahead(backbone: nn.Module, gives_prompt: bool = False) -> str:
    """Whether a token's routing depends on later tokens: ``no``, ``in training`` (evaluation is
    clean) or ``in evaluation``, which makes its language-modelling numbers worthless.

    ``gives_prompt``: contexts say which tokens are the prompt. Routers that read nothing else
    (``reads_prompt_only``) then know what a generator knows, and no answer.
    """
    modules = list(backbone.modules())
    if not all(_is_causal(module, gives_prompt) for module in modules):
        return "in evaluation"
    if not all(getattr(module, "causal_training", True) for module in modules):
        return "in training"
    return "no"


def worst_mark(backbone: nn.Module, schedules: Scheduled, gives_prompt: bool = False) -> str:
    """The worst of `looks_ahead` over the course of training; leaves the schedules at the start."""
    if not schedules:
        return looks_ahead(backbone, gives_prompt)
    found = []
    for point in reversed(range(_POINTS)):
        schedules.apply(point / (_POINTS - 1))
        found.append(looks_ahead(backbone, gives_prompt))
    return max(found, key=MARKS.index)


def refuse_lookahead(
    backbone: nn.Module, mark: str, allow_noncausal: bool, gives_prompt: bool = False
) -> None:
    """Refuses a model whose `worst_mark` says that evaluation leaks, unless it is allowed to."""
    if mark != "in evaluation" or allow_noncausal:
        return
    modules = backbone.named_modules()
    names = [name for name, module in modules if not _is_causal(module, gives_prompt)]
    raise ValueError(
        f"{min(names, default='a router under its schedule')} looks at other tokens "
        "(causal=False) and would leak the future; choose another router, or set "
        "objective.allow_noncausal=true: the results are then marked as leaking"
    )


def _is_causal(module: Any, gives_prompt: bool) -> bool:
    harmless = gives_prompt and getattr(module, "reads_prompt_only", False)
    return bool(harmless or getattr(module, "causal", True))
