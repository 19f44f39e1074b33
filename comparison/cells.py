"""Work that several processes share out among themselves: cells, each a JSON file that one process makes, once.

A lock file beside a cell says that somebody is at it. Locks are the kernel's (flock), so that they end with their
process, however it ends, and nothing is left to clean up before a run goes on.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["claimed", "machine_held", "read_cell"]


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone is at the cell. The claim ends with the process, however it ends.

    Raises:
        OSError: the file system has no locks; names the file.
    """
    lock = path.with_suffix(".lock")
    while True:
        with lock.open("w") as file:
            try:
                _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if not _is_at(file, lock):  # who had it before has removed it since it was opened
                continue
            try:
                yield True
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


@contextmanager
def machine_held(folder: Path, *, alone: bool) -> Iterator[None]:
    """Waits until the processes that share `folder` leave the machine: all of them where this one needs it `alone`
    (for measuring time), else only one that does.

    Raises:
        OSError: the file system has no locks; names the file.
    """
    with (folder / ".machine").open("a+") as file:  # to read as well: over NFS, shared locks are for readers alone
        _lock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def _lock(file: IO[str], kind: int) -> None:
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:  # somebody else has it
        raise
    except OSError as error:
        why = f"{file.name} can't be locked ({error.strerror}); give a folder on a file system that has locks"
        raise OSError(why) from error


def read_cell(path: Path, settings: Mapping[str, Any], *, remedy: str) -> dict[str, Any] | None:
    """The cell, if it has been made.

    Args:
        settings: what it must have been made with, as JSON values; compared with its "settings".
        remedy: the flag that gives another folder.

    Raises:
        ValueError: it was made with other settings, or is no JSON object; names the file.
    """
    if not path.exists():
        return None
    try:
        cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        pairs = {key: (cell["settings"].get(key), value) for key, value in settings.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no cell of this program ({type(error).__name__}); remove it") from error
    if other := {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}:
        told = ", ".join(f"{key} {was!r} instead of {wanted!r}" for key, (was, wanted) in other.items())
        raise ValueError(f"{path} was made with {told}; give another folder by {remedy}, or remove it")
    return cell
