"""Checkpoint directories of transformers: safetensors files, whole or in shards."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from routerlab.backbones.base_models import weight_files
from routerlab.convert.certificate import Certificate

_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.model"]


class Checkpoint:
    """The tensors of a directory by name, each read when it is asked for, as float32.

    Raises ValueError for a directory without them, or with only a part of them, which it calls
    ``path``.
    """

    def __init__(self, folder: Path, path: str) -> None:
        self._file_of: dict[str, Any] = {}
        if not (files := weight_files(path, folder)):
            raise ValueError(f"path={path!r}: only weights in safetensors files are converted")
        for file in files:
            opened = safe_open(file, framework="pt")
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    @property
    def keys(self) -> list[str]:
        """The names of all tensors."""
        return list(self._file_of)

    def read(self, key: str) -> Tensor:
        """One tensor."""
        return self._file_of[key].get_tensor(key).to(torch.float32)


def local_folder(source: str) -> Path:
    """The directory that ``find_base`` found, or the hub's files of that name, downloaded (or from
    the local cache).
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=_PATTERNS))
    except Exception as error:  # no network, no such name, no access
        raise ValueError(
            f"path={source!r}: could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}); give the directory that `save_pretrained` wrote"
        ) from error


def load_with_transformers(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model that transformers makes of a directory, in float32, and what it says of its
    tensors: ``missing_keys``, ``unexpected_keys``, ``mismatched_keys``.
    """
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():  # of shared experts of width 0
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            experts_implementation="eager",  # any width and type
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # it names them; a certificate fails for them
            trust_remote_code=False,
        )
    return loaded


def load_and_note(folder: Path, certificate: Certificate) -> Any:
    """The model that transformers makes of a directory; the certificate gets to know what it says
    of its tensors. Raises `ConversionFailed` for tensors of which it can make none.
    """
    try:
        model, found = load_with_transformers(folder)
    except RuntimeError as error:  # tensors that do not go together
        certificate.loading["transformers cannot read it"] = [" ".join(str(error).split())]
        certificate.check()
        raise
    lists = ("missing_keys", "unexpected_keys", "mismatched_keys")
    certificate.loading = {name: sorted(map(str, found[name])) for name in lists}
    return model


def write_checkpoint(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """``config.json`` and safetensors (in shards of 5 GB), as `save_pretrained` writes them."""
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoModelForCausalLM

    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]  # type: ignore[attr-defined]
    config.save_pretrained(folder)
    own_memory = {k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    save_torch_state_dict(own_memory, folder, metadata={"format": "pt"})
