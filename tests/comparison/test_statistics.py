"""Intervals and p-values against tables, closed forms and worked examples."""

import math

import pytest

from routerlab.comparison.statistics import (
    differences,
    holm,
    interval,
    p_value,
    paired,
    t_quantile,
    t_test,
)

# Extra hours of sleep with one drug and with the other, ten patients (Student 1908, "The probable
# error of a mean"); R's t.test(paired = TRUE): t = 4.0621, p = 0.002833, interval 0.7001 to 2.4599.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


@pytest.mark.parametrize(
    ("df", "tabulated"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_tables(df: int, tabulated: float) -> None:
    assert t_quantile(df) == pytest.approx(tabulated, abs=5e-4)


@pytest.mark.parametrize("df", [1, 2, 5, 10, 11, 30, 200, 10_000])
def test_the_p_value_at_the_quantile_is_five_percent(df: int) -> None:
    assert p_value(t_quantile(df), df) == pytest.approx(0.05, abs=1e-12)


@pytest.mark.parametrize("df", [1, 2, 5, 11, 30, 200])
def test_the_quantile_leaves_a_fortieth_of_the_density_above_it(df: int) -> None:
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    steps = 20_000  # Simpson's rule from 0 to the quantile
    width = t_quantile(df) / steps
    values = [scale * (1 + (i * width) ** 2 / df) ** (-(df + 1) / 2) for i in range(steps + 1)]
    area = values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])
    assert area * width / 3 == pytest.approx(0.475, abs=1e-9)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, -2.5, 40.0])
def test_p_values_of_one_and_two_degrees_of_freedom_in_closed_form(t: float) -> None:
    assert p_value(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)), abs=1e-12)
    assert p_value(t, 2) == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t), abs=1e-12)


def test_degrees_of_freedom_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="df=0"):
        t_quantile(0)
    with pytest.raises(ValueError, match="df=0"):
        p_value(1.0, 0)


def test_the_sleep_of_ten_patients() -> None:
    first, second = dict(enumerate(FIRST)), dict(enumerate(SECOND))
    found = paired(second, first)
    assert found is not None
    assert found.half is not None
    assert found.mean == pytest.approx(1.58)
    assert found.mean - found.half == pytest.approx(0.7001142, abs=1e-7)
    assert found.mean + found.half == pytest.approx(2.4598858, abs=1e-7)
    assert found.separated
    p = t_test(differences(second, first))
    assert p == pytest.approx(0.002833, abs=5e-7)
    assert t_test(differences(first, second)) == pytest.approx(p)


def test_interval_by_hand() -> None:
    # mean 2, standard deviation 1 (n - 1), t(2) = 4.3027: 4.3027 / sqrt(3) = 2.4841
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(2.4841, abs=1e-4)
    assert found.separated is False


def test_one_value_has_no_interval() -> None:
    found = interval([2.5])
    assert (found.mean, found.half, found.separated) == (2.5, None, None)
    assert t_test([2.5]) is None
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_pairs_of_seeds_cancel_what_they_share() -> None:
    # differences -0.1, -0.1, -0.13 over seeds that differ by 1: mean -0.11, sd 0.01732,
    # 4.3027 * 0.01732 / sqrt(3) = 0.0430
    found = paired({0: 1.9, 1: 2.9, 2: 3.87, 7: 0.0}, {0: 2.0, 1: 3.0, 2: 4.0})
    assert found is not None
    assert found.count == 3  # seed 7 has no partner
    assert found.mean == pytest.approx(-0.11)
    assert found.half == pytest.approx(0.0430, abs=1e-4)
    assert found.separated is True
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_differences_without_spread() -> None:
    assert t_test([0.0, 0.0, 0.0]) == 1.0
    assert t_test([0.5, 0.5, 0.5]) == 0.0


def test_holm_by_hand() -> None:
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04; never decreasing
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
