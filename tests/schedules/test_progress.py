"""Progress schedules by hand."""

import pytest

from routerlab.core.protocols import Schedule
from routerlab.schedules.progress import Constant, Cosine, Linear, Step


def test_values() -> None:
    assert Constant("router.top_k", 3.0).at(0.7) == 3.0
    linear = Linear("a.b", 1.0, 0.0, begin=0.2, until=0.6)
    assert [linear.at(p) for p in (0.0, 0.2, 0.6, 1.0)] == [1, 1, 0, 0]
    assert linear.at(0.3) == pytest.approx(0.75)
    cosine = Cosine("a.b", 1.0, 0.0)
    assert [cosine.at(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0])
    assert cosine.at(0.25) == pytest.approx(0.5 + 2**0.5 / 4)  # (1 + cos 45 degrees) / 2
    step = Step("a.b", [1.0, 2.0, 3.0], [0.25, 0.5])
    assert [step.at(p) for p in (0.0, 0.24, 0.25, 0.49, 0.5, 1.0)] == [1, 1, 2, 2, 3, 3]
    for schedule, extremes in ((linear, [1, 0]), (step, [1, 2, 3]), (Constant("a", 2.0), [2])):
        assert isinstance(schedule, Schedule)
        assert schedule.extremes() == extremes


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"begin=0\.5: must be below until=0\.5"):
        Linear("a.b", 1.0, 0.0, begin=0.5, until=0.5)
    with pytest.raises(ValueError, match=r"until=1\.5.*at most 1"):
        Cosine("a.b", 1.0, 0.0, until=1.5)
    with pytest.raises(ValueError, match="one more than the boundaries"):
        Step("a.b", [1.0, 2.0], [])
    with pytest.raises(ValueError, match="must increase"):
        Step("a.b", [1.0, 2.0, 3.0], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"boundaries=2\.0.*at most 1"):
        Step("a.b", [1.0, 2.0], [2.0])
