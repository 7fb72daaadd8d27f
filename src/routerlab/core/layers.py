"""Which of a model's layers is meant."""

import re
from collections.abc import Sequence


def pick_layers(names: Sequence[str], wanted: int | Sequence[int] | None, field: str) -> list[str]:
    """The layers that ``wanted`` names, in the order of depth: all of them (None), the last
    n (a number), or those of the model's layers with these numbers (a list), counted from 0 as in
    their names (``layers.03.moe``). Raises ValueError, naming ``field``, for what is not there.
    """
    if wanted is None:
        return list(names)
    if isinstance(wanted, int):
        if not 1 <= wanted <= len(names):
            raise ValueError(f"{field}={wanted}: must be from 1 to the {len(names)} layers")
        return list(names[-wanted:])
    numbers = {layer_number(name): name for name in names}
    absent = [number for number in wanted if number not in numbers]
    if absent or not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"{field}={list(wanted)}: must be different layers, of {sorted(numbers)}")
    return [numbers[number] for number in sorted(wanted)]


def layer_number(name: str) -> int:
    """The number of the model's layer in the name of a record; the first number there is."""
    found = re.search(r"\d+", name)
    if found is None:
        raise ValueError(f"layer name {name!r}: holds no number")
    return int(found.group())
