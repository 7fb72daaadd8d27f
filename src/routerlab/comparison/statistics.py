"""Means over seeds, differences by seed, and how far they can be trusted."""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mpmath


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


def interval(values: Sequence[float]) -> Interval:
    r"""The mean and :math:`t_{n-1} s / \sqrt n`."""
    if not values:
        raise ValueError("no values to take a mean of")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Interval(mean, None, 1)
    return Interval(mean, t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n), n)


def differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """``values`` less ``baseline``, for each seed that both have.

    A seed's runs share data order, so what the data do to both sides cancels.
    """
    return [values[seed] - baseline[seed] for seed in sorted(set(values) & set(baseline))]


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """The interval of the `differences`; None without a common seed."""
    found = differences(values, baseline)
    return interval(found) if found else None


def t_test(values: Sequence[float]) -> float | None:
    """The two-sided p-value of Student's t-test that the mean is 0; None for fewer than two.

    Values without any spread give 1 if they are 0, and else 0.
    """
    if len(values) < 2:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    if error == 0:
        return float(mean == 0)
    return p_value(mean / error, len(values) - 1)


def p_value(t: int | float, df: int) -> float:
    r"""The probability of :math:`|T| \ge |t|` under Student's t distribution.

    It is the regularized incomplete beta function :math:`I_{\nu / (\nu + t^2)}(\nu / 2, 1 / 2)`.
    """
    if df < 1:
        raise ValueError(f"df={df}: must be at least 1")
    x = df / (df + t * t)
    return float(mpmath.betainc(df / 2, 0.5, 0, x, regularized=True))


@functools.cache
def t_quantile(df: int) -> float:
    """The 97.5% quantile of Student's t distribution."""
    if df < 1:
        raise ValueError(f"df={df}: must be at least 1")
    # It falls from 12.706 (df = 1) to 1.95996.
    return float(
        mpmath.findroot(lambda t: p_value(float(t), df) - 0.05, (1.95, 12.8), solver="illinois")
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value corrected for the number of tests, by Holm's step-down method: rejecting those
    up to 0.05 keeps the chance of any false rejection below 5%, whatever their dependence.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        corrected[place] = min(1.0, largest)
    return corrected
