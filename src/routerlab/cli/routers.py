"""``routerlab routers``: what there is to choose from."""

from collections.abc import Sequence

from routerlab.core.config import available, describe


def main(argv: Sequence[str]) -> int:
    """Prints a line a router: its name and what it is."""
    return listing("router")


def listing(group: str) -> int:
    """Prints a line a name in a config group: the name and what it is."""
    names = available(group)
    width = max(map(len, names)) + 2
    for name in names:
        print(f"{name:<{width}}{describe(group, name)}")
    return 0
