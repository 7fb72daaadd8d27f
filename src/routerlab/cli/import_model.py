"""``routerlab import``: a mixture of experts of transformers becomes a decoder of ours."""

from collections.abc import Sequence
from pathlib import Path

from routerlab.cli import conversion


def main(argv: Sequence[str]) -> int:
    """Converts and prints the certificate. Exit codes: 0, 1 (the certificate failed, and nothing is
    left in DIR), 2 (bad options).
    """
    about = "Writes a MoE of transformers as a decoder of ours, to be used with backbone=saved."
    what = "a directory, or a name of the Hugging Face hub"
    arguments = conversion.parse(conversion.parser("import", about, "PATH", what), argv)
    if isinstance(arguments, int):
        return arguments
    from routerlab.convert.importing import import_model
    from routerlab.core.config import compose

    cache_dir = Path(compose().paths.cache_dir)
    return conversion.finish(
        lambda: import_model(arguments.source, arguments.out, cache_dir, arguments.seed)
    )
