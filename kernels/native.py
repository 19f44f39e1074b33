"""Compiling small native libraries on first use: a cache per user, one build at a time, whole files only.

The libraries have a plain C interface: no torch header is compiled, so a build takes seconds and stays valid across
torch versions. A library's name hashes its sources, the flags and the compiler's version. Its checksum lies beside it:
the system's loader would crash in a library whose end is missing, so one that does not match is built anew.

What lies in the cache is executed. So its folder must be one to which this user alone can write, and so must the files.
"""

import fcntl
import hashlib
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

__all__ = ["build_once", "cache_directory"]

_VERSION_SECONDS = 20.0  # in which a compiler says its version
_BUILD_SECONDS = 600.0  # nvcc takes minutes on few cores
_SAID = 4000  # characters of what a compiler said that an error shows, from the end


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/unlocked, or ~/.cache/unlocked.

    Raises:
        RuntimeError: XDG_CACHE_HOME is no absolute path: it would be another folder wherever a run is started.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    if root and not os.path.isabs(root):
        raise RuntimeError(f"XDG_CACHE_HOME is {root!r}; it must be an absolute path (/...)")
    return (Path(root) if root else Path.home() / ".cache") / "unlocked"


def build_once(
    name: str,
    compiler: Path,
    flags: Sequence[str],
    sources: Sequence[Path],
    headers: Iterable[Path] = (),
    *,
    timeout: float = _BUILD_SECONDS,
) -> Path:
    """The shared library of `sources`, compiled unless it is in the cache.

    Several processes may call this at once: one compiles, the others wait for it and share what comes of it, a failure
    too. What the compiler said lies beside the library, with the suffix .log. Where the cache can't be written, or
    others can write to it, the library lies in a folder of the user's own below the temporary one.

    Args:
        timeout: seconds that the compiler may take.

    Raises:
        RuntimeError: the compiler fails, or does not end in time (the text ends with what it said), or there is no
            folder to write to, or XDG_CACHE_HOME is a relative path.
    """
    library = f"{name}-{_key(compiler, flags, [*sources, *headers])}.so"
    cached = cache_directory() / library
    if _belongs_to_us(cached.parent) and _is_whole(cached):
        return cached
    target = _writable_cache() / library
    with _locked(target.with_suffix(".lock")) as failure:
        if failure:
            raise RuntimeError(failure)
        if not _is_whole(target):
            _compile(compiler, flags, sources, target, timeout)
    return target


def _writable_cache() -> Path:
    """The cache, or its stand-in below the temporary folder."""
    stand_in = Path(tempfile.gettempdir()) / f"unlocked-{os.getuid()}"
    problems = []
    for folder in (cache_directory(), stand_in):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder == stand_in and folder.is_symlink():
                raise PermissionError(f"{folder} is a link")
            _make_private(folder)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            problems.append(str(error))
    raise RuntimeError(f"no folder for compiled kernels can be written: {'; '.join(problems)}; set XDG_CACHE_HOME")


def _make_private(folder: Path) -> None:
    """Raises:
    PermissionError: others may have been here; what lies there would be executed.
    """
    if not _belongs_to_us(folder) or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is not a folder that this user alone can write to")
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def _belongs_to_us(path: Path) -> bool:
    """Nobody but this user, or root, can write to it, nor put another one in its place."""
    try:
        place = path.resolve(strict=True)
        found = place.stat()
        return (
            found.st_uid in (os.getuid(), 0)
            and not found.st_mode & 0o022
            and all(map(_keeps_its_entries, (parent.stat() for parent in place.parents)))
        )
    except OSError:
        return False


def _keeps_its_entries(folder: os.stat_result) -> bool:
    """A stranger can't rename what lies there: it is not open to all, or sticky."""
    return not folder.st_mode & stat.S_IWOTH or bool(folder.st_mode & stat.S_ISVTX)


def _is_whole(library: Path) -> bool:
    """It is there, written by us, and its bytes are those that the compiler wrote."""
    checksum = _checksum_file(library)
    try:
        ours = all(path.lstat().st_uid in (os.getuid(), 0) and _is_file(path.lstat()) for path in (library, checksum))
        return ours and checksum.read_bytes() == _checksum(library)
    except OSError:
        return False


def _is_file(found: os.stat_result) -> bool:
    """And none that others may write to."""
    return stat.S_ISREG(found.st_mode) and not found.st_mode & 0o022


def _checksum(library: Path) -> bytes:
    return hashlib.sha256(library.read_bytes()).hexdigest().encode()


def _checksum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _compile(compiler: Path, flags: Sequence[str], sources: Sequence[Path], target: Path, timeout: float) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        built = Path(folder) / target.name
        # Libraries among the flags come after the sources that need them.
        inputs = [*map(str, sources), *(flag for flag in flags if not flag.startswith("-"))]
        options = [flag for flag in flags if flag.startswith("-")]
        log = _run([str(compiler), *options, "-o", str(built), *inputs], timeout)
        if not built.exists():
            raise RuntimeError(f"{compiler} wrote no library:\n{log[-_SAID:]}")
        report = built.with_suffix(".log")
        report.write_text(log)
        _checksum_file(built).write_bytes(_checksum(built))
        for made in (built, report, _checksum_file(built)):
            made.chmod(0o700 if made == built else 0o600)  # whatever the umask says
        # A rename within one directory is atomic. The library comes last: a crash in between leaves a checksum that
        # fits no library, and the next process builds.
        report.replace(target.with_suffix(".log"))
        _checksum_file(built).replace(_checksum_file(target))
        built.replace(target)


def _run(command: Sequence[str], timeout: float) -> str:
    """What the command said. Nothing of it is left behind, whatever happens.

    Raises:
        RuntimeError: it can't be started, fails, or does not end within `timeout` seconds.
    """
    try:
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a compiler starts others, which must end with it
        )
    except OSError as error:
        raise RuntimeError(f"{command[0]} can't be started: {error}") from error
    with started:
        try:
            said, _ = started.communicate(timeout=timeout)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"{command[0]} did not end within {timeout:g} s") from error
            raise
    if started.returncode:
        raise RuntimeError(f"{command[0]} failed (exit status {started.returncode}):\n{said[-_SAID:]}".rstrip(":\n"))
    return said


def _key(compiler: Path, flags: Sequence[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for text in (*flags, _compiler_version(compiler)):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:20]


@lru_cache
def _compiler_version(compiler: Path) -> str:
    return _run([str(compiler), "--version"], _VERSION_SECONDS)


@contextmanager
def _locked(path: Path) -> Iterator[str]:
    """One process at a time. Yields what the one that was waited for failed with; empty: it did well, or nobody was.

    Where the file system has no locks, all build, and the last rename wins.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "a+", errors="replace") as file:
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        file.seek(0)
        failure = file.read() if waited else ""
        file.truncate(0)
        try:
            yield failure
        except RuntimeError as error:
            file.write(str(error))
            raise
