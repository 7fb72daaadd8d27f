"""Where the text of each domain comes from: a built-in name, a file, or `datasets`."""

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routerlab.core.download import SourceUnavailable, fetch
from routerlab.data.builtin import BUILT_IN, OFFLINE, blocks

__all__ = ["Source", "SourceUnavailable", "fingerprint", "resolve"]

Spec = str | Mapping[str, Any]
READERS = {
    ".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv",
}  # fmt: skip
OPTIONS = ("path", "name", "split", "data_files", "text_field", "streaming")


@dataclass(frozen=True)
class Source:
    """One domain's text: `documents()` reads it from the start, `spec` asks for it again."""

    spec: Spec
    version: str
    licence: str
    documents: Callable[[], Iterator[str]]


def resolve(domains: Mapping[str, Spec], cache_dir: Path) -> dict[str, Source]:
    """Returns the sources by domain; offline, built-in domains give way to three local ones.

    The replacements appear under their own names, with a warning: a router studied on licence
    texts must not be reported as one studied on an encyclopedia. Domains of the user stay.
    """
    archives = [
        BUILT_IN[spec].archive
        for spec in domains.values()
        if isinstance(spec, str) and spec in BUILT_IN
    ]
    try:
        for archive in archives:
            if archive is not None:
                fetch(archive, cache_dir)
    except SourceUnavailable as error:
        kept = {name: spec for name, spec in domains.items() if spec not in list(BUILT_IN)}
        lost = [name for name in domains if name not in kept]
        domains = {**{name: name for name in OFFLINE}, **kept}
        warnings.warn(
            f"Built-in text is unavailable ({error}). Domains {lost} are replaced by text of this "
            f"Python installation: {list(OFFLINE)}. It is less, and other, text than asked for.",
            stacklevel=2,
        )
    return {name: _source(name, spec, cache_dir) for name, spec in domains.items()}


def fingerprint(domain: str, spec: Spec) -> dict[str, Any]:
    """Returns what identifies the text: versions, options, and size and time of local files.

    Raises ValueError for a source that cannot exist: unknown name, missing file, bad option.
    """
    if isinstance(spec, str) and spec in BUILT_IN:
        return {"built_in": spec, "version": BUILT_IN[spec].version}
    options = _options(domain, spec)
    stats = [(path, path.stat()) for path in _local_files(domain, options)]
    files = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return {"options": options, "files": files}


def _source(domain: str, spec: Spec, cache_dir: Path) -> Source:
    if isinstance(spec, str) and spec in BUILT_IN:
        named = BUILT_IN[spec]
        return Source(spec, named.version, named.licence, lambda: named.documents(cache_dir))
    options = _options(domain, spec)
    is_text = options["path"] == "text" and options["streaming"] and "data_files" in options
    read = _text_documents if is_text else _dataset_documents
    where = str(options.get("data_files", options["path"]))
    return Source(spec, where, "user's own", lambda: read(domain, where, options))


def _options(domain: str, spec: Spec) -> dict[str, Any]:
    """Returns complete `datasets.load_dataset` options, plus `text_field`."""
    options: dict[str, Any] = {"path": spec} if isinstance(spec, str) else dict(spec)
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown or not isinstance(options.get("path"), str) or not options["path"]:
        raise ValueError(
            f"domain {domain!r}: a source is a name, a file, or a mapping with `path` and any of "
            f"{list(OPTIONS[1:])}; got {dict(options)}"
        )
    path = Path(options["path"]).expanduser()
    if path.suffix.lower() in READERS and "data_files" not in options:
        options |= {"path": READERS[path.suffix.lower()], "data_files": str(path)}
        options.setdefault("streaming", True)
    elif isinstance(spec, str):
        raise ValueError(_unknown_name(domain, spec, path))
    return {"split": "train", "text_field": "text", "streaming": False, **options}


def _unknown_name(domain: str, spec: str, path: Path) -> str:
    close = difflib.get_close_matches(spec, BUILT_IN, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    what = "is a file of another kind" if path.exists() else "is neither a built-in source nor"
    kinds = f"a {', '.join(READERS)} file"
    said = f"{what}; use {kinds}" if path.exists() else f"{what} {kinds}"
    return (
        f"domain {domain!r}: {spec!r} {said}. Built-in: {', '.join(BUILT_IN)}.{hint} "
        f"For anything `datasets` can load, write a mapping with `path`."
    )


def _local_files(domain: str, options: Mapping[str, Any]) -> list[Path]:
    """Returns the local files an option set reads; none for a name on a hub."""
    folder = Path(options["path"]).expanduser()
    if "data_files" not in options:
        return sorted(path for path in folder.rglob("*") if path.is_file())
    found = []
    for pattern in _flat(options["data_files"]):
        path = Path(pattern).expanduser()
        matches = [path] if path.exists() else _glob(path)
        if not matches and options["path"] in {*READERS.values()} and "://" not in pattern:
            raise ValueError(f"domain {domain!r}: no such file: {pattern}")
        if any(match.is_dir() for match in matches):
            raise ValueError(f"domain {domain!r}: {pattern} is a folder, not a file")
        found += matches
    return found


def _glob(pattern: Path) -> list[Path]:
    root = pattern.anchor or "."
    return sorted(Path(root).glob(str(pattern.relative_to(pattern.anchor or Path()))))


def _flat(files: Any) -> list[str]:
    """Returns all patterns of a `data_files` value: a string, a list, or a mapping of those."""
    if isinstance(files, Mapping):
        return [pattern for value in files.values() for pattern in _flat(value)]
    return [files] if isinstance(files, str) else [str(pattern) for pattern in files]


def _text_documents(domain: str, where: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yields blocks of some kB of UTF-8 text files, cut at blank lines."""
    for path in _local_files(domain, options):
        try:
            with path.open(encoding="utf-8-sig") as lines:
                yield from blocks(lines)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"domain {domain!r}: cannot read {path} as UTF-8: {error}") from error


def _dataset_documents(domain: str, where: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yields the text field of each row that `datasets.load_dataset` gives."""
    import datasets

    field = options["text_field"]
    loading = {key: value for key, value in options.items() if key != "text_field"}
    rows = _read_rows(domain, where, lambda: iter(datasets.load_dataset(**loading)))
    for row in rows:
        if not isinstance(row, Mapping) or field not in row:
            columns = sorted(row) if isinstance(row, Mapping) else []
            raise ValueError(
                f"domain {domain!r}: {where} has no field {field!r}; it has {columns}. "
                f"Set text_field to one of them."
            )
        if row[field] is not None and not isinstance(row[field], str):
            kind = type(row[field]).__name__
            raise ValueError(f"domain {domain!r}: field {field!r} of {where} is {kind}, not text")
        yield row[field] or ""


def _read_rows(domain: str, where: str, load: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    try:
        yield from load()
    except Exception as error:  # the loaders raise many kinds; all mean the same to the user
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"domain {domain!r}: cannot read {where}: {type(error).__name__}: {reason}"
        ) from error
