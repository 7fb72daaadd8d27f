"""``routerlab adapters``: what a pretrained model can be fine-tuned with."""

from collections.abc import Sequence

from routerlab.cli.routers import listing


def main(argv: Sequence[str]) -> int:
    """Prints a line an adapter: its name and what it is."""
    return listing("adapter")
