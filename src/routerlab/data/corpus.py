"""Tokenized text on disk: built once per setting, then opened in milliseconds."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from routerlab.core.download import locked
from routerlab.data.ngram import ngram_bits_per_byte
from routerlab.data.sources import Source, Spec, fingerprint, resolve
from routerlab.data.split import SEPARATOR, balanced_splits, read_documents
from routerlab.data.tokenizer import load_tokenizer, token_dtype, tokenizer_file

CODE_VERSION = 1  # raise it when the same setting gives other files than before
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Corpus:
    """Tokens of every domain, memory-mapped; `train[i]` and `val[i]` belong to `domains[i]`."""

    domains: list[str]
    vocab_size: int
    train: list[np.ndarray]
    val: list[np.ndarray]
    bytes_per_token: float
    """Held-out bytes over held-out tokens, all domains together."""
    meta: dict[str, Any]
    """Sources, token and byte counts, and `ngram_bits_per_byte`: the contents of meta.json."""


@dataclass(frozen=True)
class _Setting:
    """Everything that decides what the files hold."""

    domains: Mapping[str, Spec]
    tokenizer: str
    max_bytes: int
    val_fraction: float

    def key(self) -> str:
        """Returns 16 hex digits that change with the setting and with the data behind it."""
        path = tokenizer_file(self.tokenizer)
        content = "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
        domains = [(name, fingerprint(name, spec)) for name, spec in self.domains.items()]
        parts = [CODE_VERSION, domains, self.tokenizer, content, self.max_bytes, self.val_fraction]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare_corpus(
    domains: Mapping[str, Spec],
    tokenizer: str,
    max_bytes: int,
    val_fraction: float,
    cache_dir: Path,
) -> Corpus:
    """Returns the corpus of a setting, building it under `cache_dir` the first time.

    Every domain gives the same number of bytes: `max_bytes`, or what the smallest domain has.
    The last `val_fraction` of its documents is held out. Exact copies of a document are read
    once. Without a network, built-in domains are replaced (see `sources.resolve`); that corpus
    has its own key, so the one asked for is built as soon as it can be.
    """
    setting = _Setting(domains, tokenizer, max_bytes, val_fraction)
    check_names(list(domains))
    key = setting.key()
    if (cache_dir / key / "meta.json").exists():
        return _load(cache_dir / key)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with locked(cache_dir / f"{key}.lock"):
        if not (cache_dir / key / "meta.json").exists():
            sources = resolve(domains, cache_dir)
            specs = {name: source.spec for name, source in sources.items()}
            found = _Setting(specs, tokenizer, max_bytes, val_fraction)
            if found.key() == key:
                _build(found, sources, cache_dir / key)
            else:
                # Other ranks open what this process settled on, whatever their network says.
                (cache_dir / f"{key}.link").write_text(found.key())
                key = found.key()
                with locked(cache_dir / f"{key}.lock"):
                    if not (cache_dir / key / "meta.json").exists():
                        _build(found, sources, cache_dir / key)
    return _load(cache_dir / key)


def open_corpus(
    domains: Mapping[str, Spec],
    tokenizer: str,
    max_bytes: int,
    val_fraction: float,
    cache_dir: Path,
) -> Corpus:
    """Returns what `prepare_corpus` last settled on for this setting; prepares it if need be."""
    key = _Setting(domains, tokenizer, max_bytes, val_fraction).key()
    link = cache_dir / f"{key}.link"
    if not (cache_dir / key / "meta.json").exists() and link.exists():
        key = link.read_text()
    if (cache_dir / key / "meta.json").exists():
        return _load(cache_dir / key)
    return prepare_corpus(domains, tokenizer, max_bytes, val_fraction, cache_dir)


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError unless the names can serve as labels and in metric keys."""
    bad = [name for name in names if not re.fullmatch(r"[\w-]+", name) or name == "all"]
    if bad or not names:
        raise ValueError(
            "domains: names need letters, digits, '_' or '-', and not the word 'all'; "
            f"got {bad or 'no domain'}"
        )


def _load(folder: Path) -> Corpus:
    meta = json.loads((folder / "meta.json").read_text())
    tokens: dict[str, list[np.ndarray]] = {
        split: [
            np.memmap(folder / f"{split}_{index}.bin", meta["dtype"], mode="r")
            for index in range(len(meta["domains"]))
        ]
        for split in SPLITS
    }
    return Corpus(
        domains=meta["domains"],
        vocab_size=meta["vocab_size"],
        train=tokens["train"],
        val=tokens["val"],
        bytes_per_token=sum(meta["bytes"]["val"]) / sum(meta["tokens"]["val"]),
        meta=meta,
    )


def _build(setting: _Setting, sources: Mapping[str, Source], folder: Path) -> None:
    """Writes token files and meta.json to a scratch folder, then moves it into place whole."""
    tokenizer = load_tokenizer(setting.tokenizer)
    texts = balanced_splits(
        {
            name: read_documents(name, str(source.spec), source.documents(), setting.max_bytes)
            for name, source in sources.items()
        },
        setting.val_fraction,
    )
    dtype = token_dtype(tokenizer.vocab_size)
    tokens: dict[str, list[int]] = {split: [] for split in SPLITS}
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        for split in SPLITS:
            for index, documents in enumerate(texts[split]):
                pieces = [doc + SEPARATOR for doc in documents[:-1]] + documents[-1:]
                ids = np.concatenate([tokenizer.encode(piece.decode()) for piece in pieces])
                ids.astype(dtype).tofile(scratch / f"{split}_{index}.bin")
                tokens[split].append(len(ids))
        meta = _meta(setting, sources, texts)
        meta |= {"vocab_size": tokenizer.vocab_size, "dtype": dtype.__name__, "tokens": tokens}
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1, default=str))
        scratch.chmod(0o755)  # mkdtemp shuts others out; a cache may be shared
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _meta(
    setting: _Setting, sources: Mapping[str, Source], texts: Mapping[str, list[list[bytes]]]
) -> dict[str, Any]:
    joined = {split: [SEPARATOR.join(docs) for docs in texts[split]] for split in SPLITS}
    arrays = {s: [np.frombuffer(text, np.uint8) for text in joined[s]] for s in SPLITS}
    return {
        "domains": list(sources),
        "sources": {
            name: {"source": source.spec, "version": source.version, "licence": source.licence}
            for name, source in sources.items()
        },
        "tokenizer": setting.tokenizer,
        "max_bytes": setting.max_bytes,
        "val_fraction": setting.val_fraction,
        "code_version": CODE_VERSION,
        "bytes": {split: [len(text) for text in joined[split]] for split in SPLITS},
        "documents": {split: [len(docs) for docs in texts[split]] for split in SPLITS},
        "ngram_bits_per_byte": ngram_bits_per_byte(arrays["train"], arrays["val"], list(sources)),
    }
