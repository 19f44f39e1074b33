"""Paths that a user gives: the home folder's sign expanded, and held to what is there, before anything is written."""

import json
import os
from pathlib import Path
from typing import Literal

__all__ = ["Place", "checked_path"]

Place = Literal["", "file", "new file", "JSON file", "new folder", "folder"]
"""What a path is for: a file or a folder that is written (and made where it is missing), or one that is read. A
JSON file takes the place of another one, or of an empty file, and of no other."""

_PARSED_BYTES = 1 << 24  # a larger file (a trace) is known by its first and last character


def checked_path(name: str, value: str | Path, place: Place) -> Path:
    """`value` as a path, with `~` and `~user` expanded. Nothing is made on the way.

    Args:
        name: what the setting is called.
        place: what must be possible there; "": anything.

    Raises:
        ValueError: no path, no such user, or a place that can't be what it is to be; names the setting and the path.
    """
    text = str(value)
    if not text or "\0" in text:
        raise ValueError(f"{name} is {text!r}; it must be a path")
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:  # pathlib's word for an unknown user
        raise ValueError(f"{name} is {text}; there is no such user's home folder, write the path out") from error
    try:
        problem = _problem(path, place)
    except OSError as error:
        problem = f"can't be used ({error.strerror})"
    if problem:
        raise ValueError(f"{name} {path} {problem}; give a {'file in a ' if place in _FILES else ''}folder of yours")
    return path


_FILES = ("file", "new file", "JSON file")


def _problem(path: Path, place: Place) -> str:
    """What is wrong with the path, or nothing.

    Raises:
        OSError: the system can't say: the name is too long, or a folder on the way is closed.
    """
    if not place:
        return ""
    exists = path.exists()
    if place in _FILES and path.is_dir():
        return "is a folder"
    if place == "JSON file" and path.is_file() and not _holds_json(path):
        return "is there, has something else than JSON, and would be lost"
    if place not in _FILES and exists and not path.is_dir():
        return "is a file"
    if place in ("file", "folder") or (exists and not path.is_file() and not path.is_dir()):
        return ""  # read, or a device or a pipe that is written to as it is
    nearest = path.absolute()
    nearest = nearest if place == "new folder" else nearest.parent
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"can't be written: {nearest} is a file"
    return "" if os.access(nearest, os.W_OK | os.X_OK) else f"can't be written: {nearest} is closed to you"


def _holds_json(path: Path) -> bool:
    """An object or a list, as everything that is written here, or nothing yet."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _PARSED_BYTES:
            text = file.read().strip()
            try:
                return not text or isinstance(json.loads(text), dict | list)
            except (ValueError, RecursionError):
                return False
        first = file.read(16).lstrip()[:1]
        file.seek(size - 16)
        last = file.read().rstrip()[-1:]
    return (first, last) in ((b"{", b"}"), (b"[", b"]"))
