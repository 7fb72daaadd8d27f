"""``routerlab routers``: what there is to choose from."""

from collections.abc import Sequence

from routerlab.core.config import available, describe


def main(argv: Sequence[str]) -> int:
    """Prints a line a router: its name and what it is."""
    names = available("router")
    width = max(map(len, names)) + 2
    for name in names:
        print(f"{name:<{width}}{describe('router', name)}")
    return 0
