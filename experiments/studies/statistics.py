"""Means over seeds, and how far they can be trusted."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Student's t at 0.975, for 1 to 10 degrees of freedom; from there on by expansion in 1 / df
_T = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157,
      2.228139)  # fmt: skip
_Z = 1.959963985


@dataclass(frozen=True)
class Interval:
    """A mean of ``count`` values and half the width of its 95% interval (None for one value)."""

    mean: float
    half: float | None
    count: int

    @property
    def separated(self) -> bool | None:
        """Whether the interval leaves out 0; None where there is no interval."""
        return None if self.half is None else abs(self.mean) > self.half


def t_quantile(df: int) -> float:
    """The 97.5% quantile of Student's t distribution, to four decimals."""
    if df < 1:
        raise ValueError(f"df={df}: must be at least 1")
    if df <= len(_T):
        return _T[df - 1]
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )  # Abramowitz and Stegun 26.7.5
    return z + sum(term / df ** (i + 1) for i, term in enumerate(terms))


def interval(values: Sequence[float]) -> Interval:
    r"""The mean and :math:`t_{n-1} s / \sqrt n`."""
    if not values:
        raise ValueError("no values to take a mean of")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Interval(mean, None, 1)
    return Interval(mean, t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n), n)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """The interval of the differences, seed by seed; None without a common seed.

    A seed's runs share data order, so what the data do to both sides cancels.
    """
    common = sorted(set(values) & set(baseline))
    return interval([values[s] - baseline[s] for s in common]) if common else None
