"""Text that every Python installation already holds: library code, docstrings, licences."""

import ast
import hashlib
import importlib.metadata
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

# Tests, other people's packages, and generated files: character tables, one big help dump.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
    "encodings", "pydoc_data",
}  # fmt: skip
LICENCE_FILE = re.compile(r"^(LICEN[CS]E|COPYING|NOTICE)", re.IGNORECASE)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def mixed(name: str) -> str:
    """Returns a sort key that mixes names in a fixed order, the same on every machine."""
    return hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()


def python_stdlib(stdlib: Path) -> Iterator[str]:
    """Yields the standard library's source files, mixed by path, tests excluded."""
    for path in stdlib_files(stdlib):
        yield path.read_text(encoding="utf-8", errors="replace")


def stdlib_files(stdlib: Path) -> list[Path]:
    """Returns the library's .py files in a fixed mixed order."""
    found = {path.relative_to(stdlib).as_posix(): path for path in stdlib.rglob("*.py")}
    # _sysconfigdata and config-* describe the machine that built this interpreter.
    kept = [
        name
        for name in found
        if not SKIPPED_FOLDERS & set(name.split("/"))
        if not name.startswith(("_sysconfigdata", "config-"))
    ]
    return [found[name] for name in sorted(kept, key=mixed)]


def stdlib_code(stdlib: Path) -> Iterator[str]:
    """Yields the library's source files with the docstrings taken out."""
    for text in python_stdlib(stdlib):
        lines = text.splitlines(keepends=True)
        for first, last, _ in _docstrings(text):
            lines[first - 1 : last] = [""] * (last - first + 1)
        yield "".join(lines)


def stdlib_docstrings(stdlib: Path) -> Iterator[str]:
    """Yields one document a source file: its docstrings, in order."""
    for text in python_stdlib(stdlib):
        yield "\n\n".join(docstring for _, _, docstring in _docstrings(text))


def _docstrings(source: str) -> list[tuple[int, int, str]]:
    """Returns (first line, last line, cleaned text) of every docstring, by position."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in library code are not ours to report
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            place = node.body[0]
            found.append((place.lineno, place.end_lineno or place.lineno, text))
    return sorted(found)


def licence_texts(stdlib: Path) -> Iterator[str]:
    """Yields licence files of Python and of the installed packages, each paragraph only once."""
    seen: set[str] = set()
    for path in _licence_files(stdlib):
        fresh = []
        for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace")):
            words = " ".join(paragraph.split()).lower()
            if words and words not in seen:
                seen.add(words)
                fresh.append(paragraph.strip("\n"))
        if fresh:
            yield "\n\n".join(fresh)


def _licence_files(stdlib: Path) -> list[Path]:
    found = [path for path in stdlib.glob("*.txt") if LICENCE_FILE.match(path.name)]
    for package in importlib.metadata.distributions():
        for file in package.files or ():
            if LICENCE_FILE.match(file.name) and file.suffix.lower() not in (".py", ".pyc"):
                found.append(Path(str(package.locate_file(file))))
    return sorted({path for path in found if path.is_file()}, key=lambda path: path.as_posix())


def licence_version(python: str) -> str:
    """Returns a version text that changes with the set of installed packages."""
    names = sorted({f"{d.name} {d.version}" for d in importlib.metadata.distributions()})
    return f"{python}, packages {mixed(' '.join(names))[:8]}"
