"""The one way to write a file: whole or not at all, so that a reader never meets half of one. No torch in it."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

__all__ = ["json_text", "whole_file", "write_json", "write_whole"]


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
        OSError: the folder is missing or can't be written, or the disk is full.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".writing-{secrets.token_hex(4)}-{path.name}"[:255])
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        _reach_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every file system can do it for folders
        _reach_disk(path.parent)


def _reach_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
