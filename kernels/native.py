"""Compiling small native libraries on first use: a cache per user, one build at a time, whole files only.

The libraries have a plain C interface: no torch header is compiled, so a build takes seconds and stays valid across
torch versions. A library's name hashes its sources, the flags and the compiler's version.
"""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

__all__ = ["build_once", "cache_directory"]


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/unlocked, or ~/.cache/unlocked."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "unlocked"


def build_once(
    name: str, compiler: Path, flags: Sequence[str], sources: Sequence[Path], headers: Iterable[Path] = ()
) -> Path:
    """The shared library of `sources`, compiled unless it is in the cache.

    Several processes may call this at once: one compiles, the others wait for it. What the compiler said lies beside
    the library, with the suffix .log.

    Raises:
        RuntimeError: the compiler fails; the text ends with what it said.
    """
    key = _key(compiler, flags, [*sources, *headers])
    target = cache_directory() / f"{name}-{key}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if not target.exists():
            _compile(compiler, flags, sources, target)
    return target


def _compile(compiler: Path, flags: Sequence[str], sources: Sequence[Path], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        built = Path(folder) / target.name
        # Libraries among the flags come after the sources that need them.
        inputs = [*map(str, sources), *(flag for flag in flags if not flag.startswith("-"))]
        options = [flag for flag in flags if flag.startswith("-")]
        command = [str(compiler), *options, "-o", str(built), *inputs]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        log = result.stdout + result.stderr
        if result.returncode or not built.exists():
            raise RuntimeError(f"{compiler} failed (exit status {result.returncode}):\n{log[-4000:]}")
        report = built.with_suffix(".log")
        report.write_text(log)
        # A rename within one directory is atomic: whoever sees the library sees all of it.
        report.replace(target.with_suffix(".log"))
        built.replace(target)


def _key(compiler: Path, flags: Sequence[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for text in (*flags, _compiler_version(compiler)):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:20]


@lru_cache
def _compiler_version(compiler: Path) -> str:
    return subprocess.run([str(compiler), "--version"], capture_output=True, text=True, check=True).stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. Where the file system has no locks, all build, and the last rename wins."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
