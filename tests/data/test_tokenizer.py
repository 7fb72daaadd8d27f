"""Tokenizers: bytes, a JSON file, and what is said when there is neither."""

from pathlib import Path

import numpy as np
import pytest

from routerlab.data.tokenizer import load_tokenizer, token_dtype


def trained(path: Path, text: str, vocab_size: int) -> Path:
    """Saves a small byte-level BPE trained on the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(path))
    return path


def test_bytes_are_utf8() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("né")
    assert (tokenizer.name, tokenizer.vocab_size, ids.dtype) == ("bytes", 256, np.uint16)
    assert ids.tolist() == [110, 195, 169]


def test_json_file(tmp_path: Path) -> None:
    path = trained(tmp_path / "bpe.json", "low lower lowest " * 50, 270)
    tokenizer = load_tokenizer(str(path))
    ids = tokenizer.encode("lowest lower")
    assert tokenizer.name == str(path)
    assert 256 < tokenizer.vocab_size <= 270
    assert ids.dtype == np.uint16
    assert len(ids) < len("lowest lower")  # merges were applied
    assert ids.max() < tokenizer.vocab_size

    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(path)).decode(ids.tolist()) == "lowest lower"


def test_id_width() -> None:
    assert token_dtype(65536) is np.uint16
    assert token_dtype(65537) is np.uint32


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer: 'byte' is neither 'bytes' nor an existing"):
        load_tokenizer("byte")
    with pytest.raises(ValueError, match="neither"):
        load_tokenizer(str(tmp_path))


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizers JSON file"):
        load_tokenizer(str(path))
