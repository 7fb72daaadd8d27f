"""How many experts each layer has."""

import math
from collections.abc import Callable

from routerlab.core.checks import choice, within

# The share of the way from `low` to `high` at relative depth t, from 0 (first layer) to 1 (last).
_PATTERNS: dict[str, Callable[[float], float]] = {
    "uniform": lambda t: 1.0,
    "descending": lambda t: 1 - t,
    "ascending": lambda t: t,
    "pyramid": lambda t: 1 - abs(2 * t - 1),
    "inverted_pyramid": lambda t: abs(2 * t - 1),
    "wave": lambda t: (1 + math.sin(2 * math.pi * t)) / 2,
}


class LayerwiseExperts:
    """Experts of each layer by depth: ``schedule(num_layers)`` is a list of counts.

    The patterns' names are those of DynaMoE (Gülmez, arXiv 2603.01697); their formulas are
    [reconstructed], and so is ``inverted_pyramid``, which stands in for the sixth. Counts are
    rounded half up. A single layer is a first layer.

    Comparisons must match the sum over layers, for experts are parameters: ``total`` rescales the
    pattern to that sum. Each layer gets the whole part of its proportional share, and at least one
    expert; what is left goes to the largest remainders, earlier layers first. With ``total`` a
    layer may have more than ``high`` experts or fewer than ``low``.

    Args:
        pattern: ``uniform`` (``high`` everywhere), ``descending``, ``ascending``, ``pyramid`` (most
            in the middle), ``inverted_pyramid`` or ``wave`` (one period).
        low, high: fewest and most experts, at least 1.
        total: their sum over layers; null takes the pattern as it is.
    """

    def __init__(self, pattern: str, low: int, high: int, total: int | None = None) -> None:
        choice("pattern", pattern, list(_PATTERNS))
        within("low", low, 1)
        within("high", high, low)
        if total is not None:
            within("total", total, 1)
        self.pattern, self.low, self.high, self.total = pattern, low, high, total

    def __call__(self, num_layers: int) -> list[int]:
        """One count a layer, first to last. ``ValueError`` if ``total`` is too small for them."""
        within("num_layers", num_layers, 1)
        height = _PATTERNS[self.pattern]
        depths = [layer / max(1, num_layers - 1) for layer in range(num_layers)]
        exact = [self.low + (self.high - self.low) * height(t) for t in depths]
        if self.total is None:
            return [_floor(count + 0.5) for count in exact]
        return _apportion(exact, self.total)


def _apportion(exact: list[float], total: int) -> list[int]:
    """Whole numbers of at least 1 in proportion to ``exact`` that sum to ``total``."""
    if total < len(exact):
        raise ValueError(f"total={total}: must be at least num_layers={len(exact)}")
    small: set[int] = set()  # layers whose share is below 1: they get one expert
    while True:
        free = [layer for layer in range(len(exact)) if layer not in small]
        unit = (total - len(small)) / (sum(exact[layer] for layer in free) or 1)
        shares = {layer: exact[layer] * unit for layer in free}
        below = {layer for layer in free if _floor(shares[layer]) < 1}
        if not below:
            break
        small |= below
    counts = [1 if layer in small else _floor(shares[layer]) for layer in range(len(exact))]
    by_remainder = sorted(free, key=lambda layer: round(counts[layer] - shares[layer], 9))
    for layer in by_remainder[: total - sum(counts)]:
        counts[layer] += 1
    return counts


def _floor(value: float) -> int:
    """The floor, with sums that miss a whole number by a rounding error taken as that number."""
    return math.floor(value + 1e-9)
