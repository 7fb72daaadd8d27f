"""``routerlab export``: a decoder of ours, or a wrapped model, becomes one of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from routerlab.cli import conversion


def main(argv: Sequence[str]) -> int:
    """Converts and prints the certificate. Exit codes: 0, 1 (the certificate failed, and nothing is
    left in DIR), 2 (bad options).
    """
    about = "Writes a decoder of ours, or a wrapped model, as a directory that transformers loads."
    what = "a run's directory, or one that `routerlab import` or `routerlab upcycle` wrote"
    parser = conversion.parser("export", about, "SOURCE", what)
    family = "model_type to write, such as qwen3_moe (default auto: the first that fits)"
    parser.add_argument("--family", default="auto", help=family)
    arguments = conversion.parse(parser, argv)
    if isinstance(arguments, int):
        return arguments
    from routerlab.backbones.decoder import Decoder
    from routerlab.convert.exporting import export_model
    from routerlab.convert.wrapped import export_wrapped

    model, tokenizer = _read(arguments.source)
    out, family, seed, source = (
        arguments.out, arguments.family, arguments.seed, arguments.source,
    )  # fmt: skip
    if isinstance(model, Decoder):
        return conversion.finish(lambda: export_model(model, out, family, tokenizer, seed, source))
    if family not in ("auto", own := str(model.model.config.model_type)):
        raise ValueError(f"--family={family}: {source!r} holds a wrapped model, which stays {own}")
    return conversion.finish(lambda: export_wrapped(model, out, seed, source))


def _read(source: str) -> tuple[Any, Any]:
    """The model and the tokenizer of a run (its newest checkpoint) or of a saved decoder."""
    from routerlab.backbones.decoder import Decoder
    from routerlab.backbones.hugging_face import HuggingFaceMoE
    from routerlab.backbones.saved import load_decoder
    from routerlab.training.evaluate import load_objective
    from routerlab.training.run_directory import RunDirectory

    if not (Path(source).expanduser() / "config.yaml").is_file():
        decoder = load_decoder(source)
        return decoder, decoder.tokenizer
    run = RunDirectory.existing(source)
    backbone = load_objective(run)[0].backbone
    if not isinstance(backbone, Decoder | HuggingFaceMoE):
        raise ValueError(
            f"{source!r}: its backbone is {type(backbone).__name__}; what is exported is a Decoder "
            "or a HuggingFaceMoE"
        )
    own = getattr(backbone, "tokenizer", None)
    return backbone, _of_data(run.config.data.get("tokenizer")) if own is None else own


def _of_data(name: str | None) -> Any:
    """The tokenizer of the data, where it is a file; raw bytes have none."""
    if name is None or not Path(name).expanduser().is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(Path(name).expanduser()))
