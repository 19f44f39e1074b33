"""A run's folder is one run's: whoever writes to it holds its lock, which names the run. No torch in it."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

__all__ = ["hold_folder"]

_NAME = ".run.lock"
_held: set[Path] = set()  # by this process: the kernel's lock is a process's, not a thread's


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keeps other runs from writing to `folder`, which is made if it isn't there. The kernel gives the lock back when
    the process ends, however it ends; children don't inherit it.

    Raises:
        ValueError: a run holds it; says which. Or the folder can't be written.
    """
    folder = folder.resolve()
    path = folder / _NAME
    if folder in _held:
        raise ValueError(_taken(folder, f"this process ({os.getpid()})"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
    except OSError as error:
        raise ValueError(f"can't write to the save path {folder} ({error}); give a folder of yours") from error
    if descriptor is None:
        raise ValueError(_taken(folder, _holder(path)))
    _held.add(folder)
    try:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner, allow_nan=False).encode(), 0)
        yield
    finally:
        _held.discard(folder)
        path.unlink(missing_ok=True)  # while it is locked: nobody else can hold this file
        os.close(descriptor)
        with contextlib.suppress(OSError):
            folder.rmdir()  # a run that came to nothing leaves nothing


def _locked(path: Path) -> int | None:
    """The descriptor of the locked file; None: another process holds it."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # its holder has just removed it


def _holder(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _taken(folder: Path, holder: str) -> str:
    return f"{folder} is in use by another run ({holder}); choose another --experiment-name, or end that run"
