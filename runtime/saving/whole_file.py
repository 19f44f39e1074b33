"""The one way to write a file: whole or not at all, so that a reader never meets half of one. No torch in it."""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

__all__ = [
    "TEMPORARY",
    "DiskFullError",
    "append_line",
    "folder_reaches_disk",
    "json_text",
    "whole_file",
    "write_json",
    "write_whole",
]

TEMPORARY = ".writing-"
"""How the names of files begin that are being written, or were when their process was killed."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_BYTES = 1 << 20  # with less room than this, a library's error in the middle of a file is the disk's fault


class DiskFullError(OSError):
    """There is no room for a file; names it."""

    def __init__(self, path: Path, number: int = errno.ENOSPC) -> None:
        super().__init__(number, os.strerror(number), str(path))

    def __str__(self) -> str:
        return f"the disk is full: {self.filename} can't be written; make room there, or write elsewhere"


def write_whole(path: Path, text: str) -> None:
    """Writes `text` in UTF-8, lines as they are; see `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: Any, *, indent: int | None = 1, **options: Any) -> None:
    """Writes `content` as JSON that every reader takes (`json_text`), and a line's end; see `whole_file`."""
    write_whole(path, json_text(content, indent=indent, **options) + "\n")


def json_text(content: Any, *, indent: int | None = None, **options: Any) -> str:
    """`content` as JSON in the strict sense: a number that is not finite, for which JSON has no word, is null.

    Python writes NaN and Infinity by default, on which other readers (a browser's, for one) give up.

    Args:
        options: of `json.dumps`.
    """
    try:
        return json.dumps(content, indent=indent, allow_nan=False, **options)
    except ValueError:  # rare, so a long trace is not copied for nothing
        return json.dumps(_finite(content), indent=indent, allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives an empty temporary file beside `path` to write to; it takes `path`'s place when the block ends well.

    By then its bytes are on the disk, so that a crash at any moment leaves the old file or the new one. An error inside
    leaves the old file, or none, and no trace of the new one. The new file has the mode that the umask gives. What is
    not a regular file (`/dev/stdout`, a named pipe) can't be replaced and is handed out itself; a link stays one.

    Raises:
        DiskFullError: there is no room for it.
        OSError: the folder is missing or can't be written.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")  # any name that `path` may have can be longer
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _reach_disk(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        is_full = isinstance(error, OSError | RuntimeError) and _is_full(temporary, error)
        temporary.unlink(missing_ok=True)
        if is_full:
            raise DiskFullError(path) from error
        raise
    folder_reaches_disk(path.parent)


def folder_reaches_disk(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where its file system can do that."""
    with contextlib.suppress(OSError):
        _reach_disk(folder)


def append_line(path: Path, text: str) -> None:
    """Adds a line in UTF-8 to a file that grows, whole or not at all.

    Raises:
        DiskFullError: there is no room for it.
    """
    data = (text + "\n").encode()
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        written = os.write(descriptor, data)
        if written < len(data):
            os.ftruncate(descriptor, size)
            raise DiskFullError(path)
    except OSError as error:
        if error.errno in _FULL and not isinstance(error, DiskFullError):
            raise DiskFullError(path, error.errno) from error
        raise
    finally:
        os.close(descriptor)


def _is_full(path: Path, error: Exception) -> bool:
    """Whether the lack of room is behind an error; a library does not always say so."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    try:
        return shutil.disk_usage(path.parent).free < _FULL_BYTES
    except OSError:
        return False


def _reach_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
