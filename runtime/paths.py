"""Paths that a user gives: the home folder's sign expanded, and held to what is there, before anything is written."""

import os
from pathlib import Path
from typing import Literal

__all__ = ["Place", "checked_path"]

Place = Literal["", "new file", "new folder", "folder"]
"""What a path is for: a file or a folder that is written (and made where it is missing), or a folder that is read."""


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
        raise ValueError(
            f"{name} {path} {problem}; give a {'file in a ' if place == 'new file' else ''}folder of yours"
        )
    return path


def _problem(path: Path, place: Place) -> str:
    """What is wrong with the path, or nothing.

    Raises:
        OSError: the system can't say: the name is too long, or a folder on the way is closed.
    """
    if not place:
        return ""
    exists = path.exists()
    if place == "new file" and path.is_dir():
        return "is a folder"
    if place != "new file" and exists and not path.is_dir():
        return "is a file"
    if place == "folder" or (exists and not path.is_file() and not path.is_dir()):
        return ""  # read, or a device or a pipe that is written to as it is
    nearest = path.absolute()
    nearest = nearest if place == "new folder" else nearest.parent
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"can't be written: {nearest} is a file"
    return "" if os.access(nearest, os.W_OK | os.X_OK) else f"can't be written: {nearest} is closed to you"
