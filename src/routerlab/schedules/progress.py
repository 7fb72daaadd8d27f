"""Values that follow training progress: of a loss weight, a capacity, a top_k, a bias rate.

``target`` says what is set: ``loss.<name>.<attribute>``, ``router.<attribute>`` or
``balancer.<attribute>`` (of every layer).
"""

import math

from routerlab.core.checks import within


class Constant:
    """``value`` all the time."""

    def __init__(self, target: str, value: int | float) -> None:
        self.target, self.value = target, value

    def at(self, progress: int | float) -> int | float:
        """The value when a share ``progress`` (0 to 1) of training is done."""
        return self.value

    def extremes(self) -> list[int | float]:
        """The values between which it moves."""
        return [self.value]


class Linear:
    """From ``start`` to ``end`` between the shares ``begin`` and ``until`` of training."""

    def __init__(
        self,
        target: str,
        start: int | float,
        end: int | float,
        begin: int | float = 0.0,
        until: int | float = 1.0,
    ) -> None:
        within("begin", begin, 0, 1)
        within("until", until, 0, 1)
        if begin >= until:
            raise ValueError(f"begin={begin}: must be below until={until}")
        self.target, self.start, self.end = target, start, end
        self.begin, self.until = begin, until

    def at(self, progress: int | float) -> int | float:
        """The value when a share ``progress`` (0 to 1) of training is done."""
        share = (progress - self.begin) / (self.until - self.begin)
        return self.start + (self.end - self.start) * self._curve(min(1.0, max(0.0, share)))

    def extremes(self) -> list[int | float]:
        """The values between which it moves."""
        return [self.start, self.end]

    def _curve(self, share: int | float) -> int | float:
        return share


class Cosine(Linear):
    """The same along half a cosine: slow at both ends."""

    def _curve(self, share: int | float) -> int | float:
        return (1 - math.cos(math.pi * share)) / 2


class Step:
    """``values[i]`` until the share ``boundaries[i]`` of training is done, then the next one."""

    def __init__(
        self, target: str, values: list[int | float], boundaries: list[int | float]
    ) -> None:
        if len(values) != len(boundaries) + 1:
            raise ValueError(
                f"values={values}: must be one more than the boundaries={boundaries} between them"
            )
        if sorted(set(boundaries)) != list(boundaries):
            raise ValueError(f"boundaries={boundaries}: must increase")
        for boundary in boundaries:
            within("boundaries", boundary, 0, 1)
        self.target, self.values, self.boundaries = target, values, boundaries

    def at(self, progress: int | float) -> int | float:
        """The value when a share ``progress`` (0 to 1) of training is done."""
        return self.values[sum(progress >= boundary for boundary in self.boundaries)]

    def extremes(self) -> list[int | float]:
        """The values between which it moves."""
        return list(self.values)
