"""Experts by depth: the patterns by hand, and exact totals."""

import pytest

from routerlab.schedules.layerwise import LayerwiseExperts

PATTERNS = ["uniform", "descending", "ascending", "pyramid", "inverted_pyramid", "wave"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        # 2 + 6 h(t), t = 0, .2, ..., 1; rounded half up
        ("descending", [8, 7, 6, 4, 3, 2]),  # 8, 6.8, 5.6, 4.4, 3.2, 2
        ("ascending", [2, 3, 4, 6, 7, 8]),
        ("pyramid", [2, 4, 7, 7, 4, 2]),  # 2, 4.4, 6.8, ...
        ("inverted_pyramid", [8, 6, 3, 3, 6, 8]),
        ("wave", [5, 8, 7, 3, 2, 5]),  # 5 + 3 sin(72 t): 5, 7.85, 6.76, 3.24, 2.15, 5
        ("uniform", [8] * 6),
    ],
)
def test_six_layers(pattern: str, expected: list[int]) -> None:
    assert LayerwiseExperts(pattern, 2, 8)(6) == expected


@pytest.mark.parametrize(
    ("pattern", "low", "high", "expected"),
    [
        ("descending", 2, 8, [8, 6, 4, 2]),
        ("pyramid", 2, 8, [2, 6, 6, 2]),
        ("wave", 2, 8, [5, 8, 2, 5]),  # 5, 7.6, 2.4, 5
        # python's round would send 2.5 to 2
        ("descending", 1, 4, [4, 3, 3, 2, 1]),  # 4, 3.25, 2.5, 1.75, 1
        ("pyramid", 1, 4, [1, 3, 4, 3, 1]),  # 1, 2.5, 4, 2.5, 1
        ("descending", 2, 8, [8]),
        ("ascending", 2, 8, [2]),
        # sin(2 pi) is -2e-16, and 2.5 - 4e-16 is still half
        ("wave", 1, 4, [3, 3]),
    ],
)
def test_other_depths(pattern: str, low: int, high: int, expected: list[int]) -> None:
    assert LayerwiseExperts(pattern, low, high)(len(expected)) == expected


def test_sums_to_match_in_comparisons() -> None:
    sums = {name: sum(LayerwiseExperts(name, 2, 8)(6)) for name in PATTERNS}
    assert sums == {
        "uniform": 48,
        "descending": 30,
        "ascending": 30,
        "pyramid": 26,
        "inverted_pyramid": 34,
        "wave": 30,
    }


@pytest.mark.parametrize(
    ("pattern", "low", "high", "total", "expected"),
    [
        ("uniform", 2, 8, 30, [5] * 6),
        ("uniform", 2, 8, 26, [5, 5, 4, 4, 4, 4]),  # 4.33 each: earlier layers first
        ("descending", 2, 8, 30, [8, 7, 6, 4, 3, 2]),  # its own sum: unchanged
        # times 1.6: 12.8, 10.88, 8.96, 7.04, 5.12, 3.2 -> floors 45, three more to .96, .88, .8
        ("descending", 2, 8, 48, [13, 11, 9, 7, 5, 3]),
        # shares 5.6, 1.4 (of 7) with 1 and 4 -> 1.4, 5.6
        ("ascending", 1, 4, 7, [1, 6]),
        # shares .99, 8.01, .99: two layers are raised to 1, the rest is for the third
        ("pyramid", 1, 9, 10, [1, 8, 1]),
        ("pyramid", 1, 9, 3, [1, 1, 1]),
    ],
)
def test_total(pattern: str, low: int, high: int, total: int, expected: list[int]) -> None:
    assert LayerwiseExperts(pattern, low, high, total)(len(expected)) == expected


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_layers", [1, 2, 5, 12, 31])
def test_total_is_exact_and_no_layer_is_empty(pattern: str, num_layers: int) -> None:
    for low, high in ((1, 1), (1, 64), (2, 8)):
        for total in (num_layers, num_layers + 1, 3 * num_layers + 2, 100 * num_layers - 1):
            counts = LayerwiseExperts(pattern, low, high, total)(num_layers)
            assert sum(counts) == total
            assert min(counts) >= 1
            assert len(counts) == num_layers


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="pattern='valley'.*'wave'"):
        LayerwiseExperts("valley", 2, 8)
    with pytest.raises(ValueError, match="low=0: must be at least 1"):
        LayerwiseExperts("wave", 0, 8)
    with pytest.raises(ValueError, match="high=1: must be at least 2"):
        LayerwiseExperts("wave", 2, 1)
    with pytest.raises(ValueError, match="total=5: must be at least num_layers=6"):
        LayerwiseExperts("wave", 2, 8, total=5)(6)
    with pytest.raises(ValueError, match="num_layers=0"):
        LayerwiseExperts("wave", 2, 8)(0)
