"""Refusals of constructor arguments: each names the field, the value and the allowed range."""

import math
from collections.abc import Sequence


def choice(field: str, value: object, allowed: Sequence[object]) -> None:
    """``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{field}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def within(
    field: str,
    value: int | float,
    low: int | float = -math.inf,
    high: int | float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """``value`` is finite, from ``low`` to ``high``; ``above`` and ``below`` exclude the ends."""
    fits = (value > low if above else value >= low) and (value < high if below else value <= high)
    if not (fits and math.isfinite(value)):
        ends = []
        if low > -math.inf:
            ends.append(f"above {low:g}" if above else f"at least {low:g}")
        if high < math.inf:
            ends.append(f"below {high:g}" if below else f"at most {high:g}")
        raise ValueError(f"{field}={value}: must be {' and '.join(ends) or 'finite'}")
