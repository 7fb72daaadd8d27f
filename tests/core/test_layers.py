"""Which layers are meant by a number, a list or nothing."""

from collections.abc import Sequence

import pytest

from routerlab.core.layers import layer_number, pick_layers

NAMES = ["layers.03.moe", "layers.05.moe", "layers.10.moe"]


@pytest.mark.parametrize(
    ("wanted", "picked"),
    [
        (None, NAMES),
        (1, NAMES[2:]),
        (2, NAMES[1:]),
        (3, NAMES),
        ([5], NAMES[1:2]),
        ([10, 3], [NAMES[0], NAMES[2]]),  # in the order of depth
        ((3, 5, 10), NAMES),
    ],
)
def test_layers_are_the_last_ones_or_those_of_these_numbers(
    wanted: int | Sequence[int] | None, picked: list[str]
) -> None:
    assert pick_layers(NAMES, wanted, "layers") == picked


@pytest.mark.parametrize("wanted", [0, -1, 4])
def test_more_layers_than_there_are(wanted: int) -> None:
    with pytest.raises(ValueError, match=rf"tuned={wanted}: must be from 1 to the 3 layers"):
        pick_layers(NAMES, wanted, "tuned")


@pytest.mark.parametrize("wanted", [[], [4], [3, 3], [3, 11], [-1]])
def test_layers_that_are_not_there(wanted: list[int]) -> None:
    with pytest.raises(ValueError, match=r"tuned=\[.*\]: must be different .* of \[3, 5, 10\]"):
        pick_layers(NAMES, wanted, "tuned")


def test_a_layer_has_the_first_number_in_its_name() -> None:
    assert layer_number("model.layers.07.mlp.2") == 7
    with pytest.raises(ValueError, match=r"layer name 'head': holds no number"):
        layer_number("head")
