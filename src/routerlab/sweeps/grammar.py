"""What each word of a sweep varies, in hydra's own grammar."""

import functools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from routerlab.core.config import ConfigError, available, nearest, quoted

MOST_JOBS = 10_000  # of one sweep
_TAGS = {"log"}


@dataclass(frozen=True)
class Axis:
    """Alternatives that are crossed with those of every other axis: ``words`` such as
    ``router=hash``.
    """

    key: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """One of ``words`` is drawn; ``ordered`` if near ones are alike (``range()``)."""

    key: str
    words: tuple[str, ...]
    ordered: bool

    def draw(self, unit: float) -> str:
        """The word at ``unit`` in [0, 1), all equally likely."""
        return self.words[int(unit * len(self.words))]


@dataclass(frozen=True)
class Interval:
    """A number from ``low`` to ``high`` is drawn, evenly or evenly in its logarithm."""

    key: str
    low: int | float
    high: int | float
    log: bool
    integer: bool

    def draw(self, unit: float) -> str:
        """The word at ``unit`` in [0, 1); both ends of integers belong to them."""
        margin = 0.5 if self.integer else 0.0  # every integer has as much room as the others
        low, high = self.low - margin, self.high + margin
        value = low * (high / low) ** unit if self.log else low + (high - low) * unit
        return self.word(min(max(value, self.low), self.high))

    def word(self, value: int | float) -> str:
        """``key=value`` with at most six significant digits, so that the run is found again."""
        return f"{self.key}={round(value) if self.integer else float(f'{value:.6g}')}"


@dataclass(frozen=True)
class Plan:
    """Words that all jobs share, axes that are crossed, and what each trial draws. The axis of the
    seeds stands apart.
    """

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    drawn: tuple[Choice | Interval, ...]
    seeds: Axis


def parse(words: Sequence[str], searching: bool) -> Plan:
    """Sorts words into a `Plan`. ``searching``: ``choice()``, ``range()`` and ``interval()`` are
    drawn; else the first two are crossed, and an interval is refused.
    """
    fixed, axes, drawn, seeds = [], [], [], Axis("seed", ("",))
    for word in words:
        override = _parsed(word)
        key = override.get_key_element()
        if not override.is_sweep_override():
            fixed.append(word)
            continue
        found = _varied(override, searching and key != "seed")
        if isinstance(found, Choice | Interval):
            drawn.append(found)
        elif len(found.words) == 1:
            fixed.append(found.words[0])
        elif key == "seed":
            seeds = found
        else:
            axes.append(found)
    return Plan(tuple(fixed), tuple(axes), tuple(drawn), seeds)


def key_of(word: str) -> str:
    """The key that a word is about, without the ``+`` of an addition."""
    return _override(word).get_key_element().lstrip("+")


def varies(word: str) -> bool:
    """Whether a word has several values, or draws one."""
    return bool(_override(word).is_sweep_override())


def value_of(word: str) -> Any:
    """The value of a word that has one."""
    return _override(word).value()


def sets_value(word: str) -> bool:
    """Whether a word changes a value that is there already; none adds, deletes or is ``a@b``."""
    override = _override(word)
    plain = override.package is None and override.type.name == "CHANGE"
    return plain and "/" not in override.key_or_group


def literal(value: Any) -> str:
    """The text that hydra reads as this value: a string, number, truth value, null, or a list."""
    if isinstance(value, list):
        return f"[{','.join(map(literal, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value)
    if re.fullmatch(r"[A-Za-z0-9_./+@-]+", value) and value_of(f"key={value}") == value:
        return value
    return quoted(value)


def _varied(override: Any, searching: bool) -> Axis | Choice | Interval:
    from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, RangeSweep

    key, value, said = override.get_key_element(), override.value(), override.input_line
    tags = getattr(value, "tags", set())
    if wrong := tags - _TAGS:
        raise ConfigError(f"{said}: no tag {min(wrong)!r}; {nearest(min(wrong), _TAGS)}")
    if tags and not isinstance(value, IntervalSweep):
        raise ConfigError(f"{said}: the tag log is for interval(), whose numbers it spreads")
    if isinstance(value, Glob):
        return _matching(key, override.key_or_group, value, said)
    if isinstance(value, IntervalSweep):
        return _interval(key, value, searching, said)
    if not isinstance(value, ChoiceSweep | RangeSweep):
        raise ConfigError(f"{said}: not a value to vary")
    ordered = isinstance(value, RangeSweep)
    drawn = searching and (ordered or not value.simple_form)
    if drawn and value.shuffle:
        raise ConfigError(f"{said}: without shuffle(); a search draws from it in any order")
    texts = _range(value, said) if ordered else list(override.sweep_string_iterator())
    words = tuple(dict.fromkeys(f"{key}={text}" for text in texts))
    return Choice(key, words, ordered) if drawn else Axis(key, words)


def _range(value: Any, said: str) -> list[str]:
    """The numbers of a ``range()``, in decimal arithmetic: 0.3 after 0.1 and 0.2."""
    ends = (value.start, value.stop, value.step)
    if not all(map(math.isfinite, ends)) or value.step == 0:
        raise ConfigError(f"{said}: takes finite ends and a step other than 0")
    start, stop, step = (Decimal(str(number)) for number in ends)
    if not 0 < (count := math.ceil((stop - start) / step)) <= MOST_JOBS:
        raise ConfigError(f"{said}: {'no' if count <= 0 else f'more than {MOST_JOBS:,}'} values")
    number = int if all(isinstance(end, int) for end in ends) else float
    texts = [str(number(start + n * step)) for n in range(count)]
    if value.shuffle:
        random.shuffle(texts)
    return texts


def _matching(key: str, group: str, glob: Any, said: str) -> Axis:
    names = available(group)
    if not (found := glob.filter(names)):
        hint = nearest(glob.include[0], names)
        raise ConfigError(f"{said}: matches none of the choices; {hint}")
    return Axis(key, tuple(f"{key}={name}" for name in found))


def _interval(key: str, interval: Any, searching: bool, said: str) -> Interval:
    if key == "seed":
        raise ConfigError(f"{said}: seeds are a list, such as seed=0,1,2 or seed=range(3)")
    if not searching:
        raise ConfigError(
            f"{said}: an interval is drawn from, which takes --trials N; or give a list"
        )
    low, high, log = interval.start, interval.end, "log" in interval.tags
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{said}: the first end must be below the second, and both finite")
    if log and low <= 0:
        raise ConfigError(f"{said}: the logarithm needs an interval above 0")
    return Interval(key, low, high, log, isinstance(low, int) and isinstance(high, int))


def _parsed(word: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ConfigError(f"{word}: not a word such as KEY=VALUE; {error}") from error


_override = functools.lru_cache(maxsize=10_000)(_parsed)  # to look at: a millisecond each
