"""Hydra's words, as they are sorted and written again."""

import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

import routerlab as rl
from routerlab.sweeps import grammar
from routerlab.sweeps.grammar import Choice, Interval, value_of


def test_a_glob_finds_our_routers() -> None:
    [axis] = grammar.parse(["router=glob(*)"], False).axes
    assert [word.removeprefix("router=") for word in axis.words] == rl.available("router")


_texts = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0$"), min_size=1, max_size=9
)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _texts,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(_texts, min_size=2, max_size=4, unique=True))
def test_quoted_alternatives_stay_what_they_are(texts: list[str]) -> None:
    word = f"embedder={','.join(map(grammar.literal, texts))}"
    [axis] = grammar.parse([word], False).axes
    assert [grammar.value_of(word) for word in axis.words] == texts


@settings(max_examples=25, deadline=None)
@given(_values)
def test_a_literal_is_read_as_its_value(value: Any) -> None:
    found = grammar.value_of(f"key={grammar.literal(value)}")
    assert (found, type(found)) == (value, type(value))


@settings(max_examples=40, deadline=None)
@given(
    st.floats(1e-6, 1e6), st.floats(1.001, 1e6), st.booleans(), st.booleans(),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=2),
)  # fmt: skip
def test_draws_lie_in_the_interval_and_in_order(
    low: float, ratio: float, log: bool, integer: bool, units: list[float]
) -> None:
    ends: tuple[int | float, int | float] = (low, low * ratio)
    if integer:
        ends = (math.ceil(low), math.ceil(low) + math.ceil(ratio))
    interval = Interval("x", *ends, log=log, integer=integer)
    found = [value_of(interval.draw(unit)) for unit in sorted(units)]
    assert found == sorted(found)
    assert all(isinstance(value, int if integer else float) for value in found)
    slack = 0 if integer else 1e-5
    assert ends[0] * (1 - slack) <= min(found)
    assert max(found) <= ends[1] * (1 + slack)
    text = interval.draw(units[0])
    assert interval.word(value_of(text)) == text  # a word is rounded once and for all


def test_draws_spread_as_they_should() -> None:
    units = [(n + 0.5) / 1000 for n in range(1000)]
    spread = Interval("x", 1e-4, 1e-2, log=True, integer=False)
    assert sum(value_of(spread.draw(unit)) < 1e-3 for unit in units) == 500
    even = Interval("x", 1, 4, log=False, integer=True)
    counts = [sum(value_of(even.draw(unit)) == n for unit in units) for n in range(1, 5)]
    assert counts == [250] * 4
    choice = Choice("x", ("x=a", "x=b"), ordered=False)
    assert [choice.draw(0.0), choice.draw(0.4999), choice.draw(0.5)] == ["x=a", "x=a", "x=b"]
