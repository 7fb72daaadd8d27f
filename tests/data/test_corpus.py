"""The corpus on disk: splits, balance, exact counts, the cache and its key."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from routerlab.data import corpus as corpus_module
from routerlab.data.builtin import BUILT_IN
from routerlab.data.corpus import Corpus, open_corpus, prepare_corpus
from routerlab.data.split import balanced_splits, cut, joined_size, read_documents
from tests.data.conftest import FOUR
from tests.data.test_sources import no_index
from tests.data.test_tokenizer import trained


def text_of(tokens: np.ndarray) -> str:
    return tokens.astype(np.uint8).tobytes().decode()


def test_documents_are_cleaned_and_cut() -> None:
    texts = ["one\n", "", "  \n", "two", "one", "näive", "never read"]
    # "one" + 2 + "two" + 2 = 10 bytes; 2 more hold "n", and half of "ä" becomes a newline.
    assert read_documents("d", "x", texts, 12) == [b"one", b"two", b"n\n"]
    assert read_documents("d", "x", texts[:4], 100) == [b"one", b"two"]
    with pytest.raises(ValueError, match="domain 'd': x.txt holds no text"):
        read_documents("d", "x.txt", ["", " \n"], 100)


def test_cut_is_exact() -> None:
    documents = ["äöü".encode(), b"b", "€".encode() * 3]
    for size in range(1, joined_size(documents) + 1):
        joined = b"\n\n".join(cut(documents, size))
        assert len(joined) == size
        joined.decode()


def test_split_by_hand() -> None:
    # 10 documents of 8 bytes join to 98; a tenth is 9, so the last two (18 bytes) are held out.
    big = [b"big %04d" % n for n in range(10)]
    small = [b"small%03d" % n for n in range(10)]
    splits = balanced_splits({"big": big, "small": small}, 0.1)
    assert splits == {"train": [big[:8], small[:8]], "val": [big[8:], small[8:]]}


def test_smallest_domain_sets_the_size() -> None:
    big = [b"big document %05d" % n for n in range(1000)]
    small = [b"small %d" % n for n in range(300)]
    splits = balanced_splits({"big": big, "small": small}, 0.2)
    for documents in splits.values():
        assert joined_size(documents[0]) == joined_size(documents[1])
    total = sum(joined_size(documents[0]) for documents in splits.values())
    assert 0.95 * joined_size(small) < total <= joined_size(small)
    assert joined_size(splits["val"][0]) == pytest.approx(0.2 * joined_size(small), rel=0.05)


def test_one_long_document_still_gives_a_split() -> None:
    book = b"".join(b"line %d of a book\n" % n + b"\n" * (n % 7 == 0) for n in range(3000))
    splits = balanced_splits({"book": [book]}, 0.05)
    assert joined_size(splits["val"][0]) == pytest.approx(0.05 * len(book), rel=0.2)
    with pytest.raises(ValueError, match="domain 'note': 4 bytes of text are too few to hold out"):
        balanced_splits({"note": [b"tiny"]}, 0.05)


def test_four_domains(four_domains: Corpus) -> None:
    assert four_domains.domains == list(FOUR)
    sizes = four_domains.meta["bytes"]
    assert len(set(sizes["train"])) == len(set(sizes["val"])) == 1
    assert 3_700_000 < sizes["train"][0] + sizes["val"][0] <= 4_000_000
    assert sizes["val"][0] == pytest.approx(200_000, rel=0.01)
    assert four_domains.bytes_per_token == 1.0
    for index in range(4):
        train, val = text_of(four_domains.train[index]), text_of(four_domains.val[index])
        assert len(train.encode()) == sizes["train"][index]
        assert len(val.encode()) == sizes["val"][index]
        for start in range(2000, len(val) - 200, 5000):
            assert val[start : start + 200] not in train


def test_documents_are_held_out_whole(cache_dir: Path, four_domains: Corpus) -> None:
    train, val = text_of(four_domains.train[0]), text_of(four_domains.val[0])
    leads = list(BUILT_IN["wikipedia"].documents(cache_dir))
    in_train = {lead for lead in leads if lead in train}
    in_val = {lead for lead in leads if lead in val}
    assert len(in_train) > 7000
    assert len(in_val) > 400
    assert not in_train & in_val


def test_bpe_counts_are_exact(tmp_path: Path, text_file: Path) -> None:
    path = trained(tmp_path / "bpe.json", text_file.read_text(), 400)
    corpus = prepare_corpus({"mine": str(text_file)}, str(path), 8000, 0.1, tmp_path / "cache")
    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(path)).decode
    plain = prepare_corpus({"mine": str(text_file)}, "bytes", 8000, 0.1, tmp_path / "cache")
    for split in ("train", "val"):
        [tokens], [raw] = getattr(corpus, split), getattr(plain, split)
        assert decode(tokens.tolist()) == text_of(raw)
        assert corpus.meta["tokens"][split] == [len(tokens)]
        assert corpus.meta["bytes"][split] == [len(raw)]
    assert corpus.bytes_per_token == len(plain.val[0]) / len(corpus.val[0]) > 1.5
    # The n-gram baseline counts bytes, whatever the tokens are.
    assert corpus.meta["ngram_bits_per_byte"] == plain.meta["ngram_bits_per_byte"]


CACHE_HIT = """
import json, sys, time
from pathlib import Path
from routerlab.data.corpus import prepare_corpus
start = time.perf_counter()
corpus = prepare_corpus(json.loads(sys.argv[1]), "bytes", 4_000_000, 0.05, Path(sys.argv[2]))
seconds = time.perf_counter() - start
print(json.dumps([seconds, [m for m in ("datasets", "tokenizers", "torch") if m in sys.modules]]))
"""


def test_cache_hit_is_quick_and_imports_nothing(cache_dir: Path, four_domains: Corpus) -> None:
    command = [sys.executable, "-c", CACHE_HIT, json.dumps(FOUR), str(cache_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, imported = json.loads(done.stdout)
    assert seconds < 0.05
    assert imported == []


def folders(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir() and path.name != "downloads"}


def test_each_option_has_its_own_folder(tmp_path: Path, text_file: Path) -> None:
    cache, mine = tmp_path / "cache", {"mine": str(text_file)}
    bpe = trained(tmp_path / "bpe.json", text_file.read_text(), 300)
    for count, setting in enumerate(
        [
            (mine, "bytes", 8000, 0.1),
            ({"yours": str(text_file)}, "bytes", 8000, 0.1),
            (mine, "bytes", 7000, 0.1),
            (mine, "bytes", 8000, 0.2),
            (mine, str(bpe), 8000, 0.1),
        ],
        start=1,
    ):
        prepare_corpus(*setting, cache)
        assert len(folders(cache)) == count
        prepare_corpus(*setting, cache)
        assert len(folders(cache)) == count
    assert all(len(name) == 16 for name in folders(cache))  # no scratch folder is left behind
    trained(bpe, text_file.read_text(), 320)
    prepare_corpus(mine, str(bpe), 8000, 0.1, cache)
    assert len(folders(cache)) == 6
    text_file.write_text(text_file.read_text().replace("says", "said"))
    os.utime(text_file, ns=(1, 1))
    changed = prepare_corpus(mine, "bytes", 8000, 0.1, cache)
    assert "said" in text_of(changed.train[0])


def test_code_version_changes_the_key(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_corpus({"mine": str(text_file)}, "bytes", 8000, 0.1, tmp_path / "cache")
    monkeypatch.setattr(corpus_module, "CODE_VERSION", -1)
    prepare_corpus({"mine": str(text_file)}, "bytes", 8000, 0.1, tmp_path / "cache")
    assert len(folders(tmp_path / "cache")) == 2


def _prepare_and_log(path: str, cache: Path, log: Path) -> None:
    real = corpus_module._build

    def build(*arguments: object) -> None:
        with log.open("a") as file:
            file.write("built\n")
        real(*arguments)  # type: ignore[arg-type]

    corpus_module._build = build
    prepare_corpus({"mine": path}, "bytes", 8000, 0.1, cache)


def test_parallel_jobs_build_once(tmp_path: Path, text_file: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (str(text_file), tmp_path / "cache", tmp_path / "log")
    jobs = [context.Process(target=_prepare_and_log, args=arguments) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"domain 'mine': .*empty.txt holds no text"):
        prepare_corpus({"mine": str(tmp_path / "empty.txt")}, "bytes", 8000, 0.1, tmp_path / "c")
    assert folders(tmp_path / "c") == set()


@pytest.mark.parametrize("name", ["all", "a b", "a/b", ""])
def test_domain_names_must_serve_as_keys(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="domains: names need letters"):
        prepare_corpus({name: "wikipedia"}, "bytes", 8000, 0.1, tmp_path)


def test_fallback_is_cached_apart(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ({"scripture": "scripture"}, "bytes", 50_000, 0.1, tmp_path)
    with monkeypatch.context() as offline:
        no_index(offline)
        with pytest.warns(UserWarning, match="Built-in text is unavailable"):
            fallen = prepare_corpus(*request)
        assert fallen.domains == ["stdlib_code", "stdlib_docstrings", "licence_texts"]
    # Another rank opens the same corpus, even if its own network works.
    assert open_corpus(*request).meta == fallen.meta
    # A later start, with a network, gets what was asked for.
    (tmp_path / "downloads").rmdir()
    (tmp_path / "downloads").symlink_to(cache_dir / "downloads")
    assert prepare_corpus(*request).domains == ["scripture"]
    assert open_corpus(*request).domains == ["scripture"]
