"""Turning text into token ids: raw bytes, or a `tokenizers` JSON file of the user's."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

BYTES = "bytes"


@runtime_checkable
class Tokenizer(Protocol):
    """What a corpus needs of a tokenizer."""

    name: str
    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids, uint16 where the vocabulary allows it, else uint32."""
        ...


class ByteTokenizer:
    """Gives the UTF-8 bytes of a text: 256 tokens, nothing to train, one byte a token."""

    name = BYTES
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """Returns the UTF-8 bytes; a lone surrogate, which has none, becomes '?'."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)


class FileTokenizer:
    """Gives the ids of a tokenizer saved by the `tokenizers` library, no special tokens added."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer: {path} is not a tokenizers JSON file: {error}") from error
        self.name = str(path)
        # Ids may have gaps, so the largest id counts, not the number of entries.
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids of the text."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, token_dtype(self.vocab_size))


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Returns the smallest of uint16 and uint32 that holds every id below vocab_size."""
    return np.uint16 if vocab_size <= 65536 else np.uint32


def tokenizer_file(name: str) -> Path | None:
    """Returns the file a tokenizer setting names, None for `bytes`; ValueError if it is absent."""
    if name == BYTES:
        return None
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"tokenizer: {name!r} is neither {BYTES!r} nor an existing `tokenizers` JSON file"
        )
    return path


def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer called `bytes`, or the one in the JSON file of that path."""
    path = tokenizer_file(name)
    return ByteTokenizer() if path is None else FileTokenizer(path)
