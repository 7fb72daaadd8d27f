"""Whether routing depends on later tokens: what makes language-modelling numbers dishonest."""

from torch import nn

from routerlab.objectives.scheduled import Scheduled

MARKS = ("no", "in training", "in evaluation")
_POINTS = 101  # of training progress, at which schedules are looked at


def looks_ahead(backbone: nn.Module) -> str:
    """Whether a token's routing depends on later tokens: ``no``, ``in training`` (evaluation is
    clean) or ``in evaluation``, which makes its language-modelling numbers worthless.
    """
    modules = list(backbone.modules())
    if not all(getattr(module, "causal", True) for module in modules):
        return "in evaluation"
    if not all(getattr(module, "causal_training", True) for module in modules):
        return "in training"
    return "no"


def worst_mark(backbone: nn.Module, schedules: Scheduled) -> str:
    """The worst of `looks_ahead` over the course of training; leaves the schedules at the start."""
    if not schedules:
        return looks_ahead(backbone)
    found = []
    for point in reversed(range(_POINTS)):
        schedules.apply(point / (_POINTS - 1))
        found.append(looks_ahead(backbone))
    return max(found, key=MARKS.index)
