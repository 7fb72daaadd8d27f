"""``routerlab upcycle``: a dense model of transformers becomes a mixture of experts of ours."""

from collections.abc import Sequence

from routerlab.cli import conversion


def main(argv: Sequence[str]) -> int:
    """Converts and prints the certificate. Exit codes: 0, 1 (the certificate failed, and nothing is
    left in DIR), 2 (bad options).
    """
    about = "Writes a dense model as a mixture of experts of ours, to be used with backbone=saved."
    what = "smollm2, a directory, or a name of the Hugging Face hub"
    parser = conversion.parser("upcycle", about, "PATH", what)
    words = "backbone.num_experts=8, backbone.layers=2, router=NAME, router.KNOB=VALUE, ..."
    parser.add_argument("words", nargs="*", metavar="WORD", help=words)
    arguments = conversion.parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    from routerlab.convert.upcycling import upcycle_model

    return conversion.finish(
        lambda: upcycle_model(arguments.source, arguments.out, arguments.words, arguments.seed)
    )
