"""Which folder a run gets: NAME, or NAME-2, NAME-3, ... where runs of that name are there already. No torch in it.

All processes of a run find the same one without asking each other, also while other runs look for theirs: who comes
first leaves a claim in the folder, which names the run, and the run's other processes know it by that name.
"""

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unlocked.runtime.saving.whole_file import json_text

__all__ = [
    "ASIDE",
    "CONFIG",
    "RUN_FILES",
    "check_experiment_name",
    "claim_folder",
    "folder_name",
    "give_up_claim",
    "numbers_of",
    "run_folder_of",
    "saved_settings",
]

ASIDE = "set-aside"
"""How folders begin, beside a run's snapshots, of those that it does not go on from."""
CONFIG = "config.json"
RUN_FILES = ("train.log", "metrics.csv", CONFIG)
"""A folder that has one of them holds a run."""
_CLAIM = ".run.claim"


def folder_name(name: str, number: int) -> str:
    """Of the run `number`, from 1, of those that are called `name`."""
    return name if number == 1 else f"{name}-{number}"


def numbers_of(root: Path, name: str) -> list[int]:
    """The numbers of the runs of that name below `root`, in order."""
    found = []
    for path in root.glob(f"{_escaped(name)}*"):
        rest = path.name.removeprefix(name)
        number = 1 if not rest else int(rest[1:]) if rest[0] == "-" and rest[1:].isdecimal() else 0
        if number and folder_name(name, number) == path.name and _holds_run(path):
            found.append(number)
    return sorted(found)


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings in the folder's config.json; none where there is no such file, or none that can be read."""
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def find_run(root: Path, name: str, *, settings: Mapping[str, Any] | None, resume: Path | None) -> int | None:
    """The number of the run below `root` that is to go on; None: that run has another folder, or none yet.

    Args:
        name: what such runs are called.
        settings: those by which the run is found again: it is the newest of its name that has saved the same.
        resume: a run's folder, or its snapshots.
    """
    if settings is not None:
        for number in reversed(numbers_of(root, name)):
            told = saved_settings(root / folder_name(name, number))
            if told and all(told.get(key, value) == value for key, value in settings.items()):
                return number
    elif resume is not None and (old := run_folder_of(resume)).parent.resolve() == root.resolve():
        for number in numbers_of(root, name):
            if folder_name(name, number) == old.name:
                return number
    return None


def run_folder_of(path: Path) -> Path:
    """The run's folder, of that or of its folder of snapshots or of one of those. What was set aside is not the run's
    any more: who goes on from there does so in another folder."""
    for folder in (path, path.parent):
        if folder.name == "snapshots" and not path.name.startswith(ASIDE):
            return folder.parent
    return path


def claim_folder(root: Path, name: str, number: int | None = None) -> int:
    """Claims the folder of the run `number` of that name; None: of the first number that is free.

    A process of a run that has claimed one already gets that one's number, also in the middle of the run.

    Raises:
        ValueError: `root` can't be written.
    """
    try:
        for one in _candidates(root, name):
            if _claimed_by_us(root / folder_name(name, one)):
                return one
        if number is not None:
            _claim(root / folder_name(name, number))
            return number
        one = 1
        while _holds_run(root / folder_name(name, one)) or not _claim(root / folder_name(name, one)):
            one += 1
        return one
    except OSError as error:
        raise ValueError(f"can't write to the save path {root} ({error}); give a folder of yours") from error


def give_up_claim(folder: Path, *, failed: bool) -> None:
    """At the end of a run. A folder in which nothing else lies is removed.

    Args:
        failed: a process of a run that its launcher may start again: where the run had begun, it keeps its folder.
    """
    if _claimed_by_us(folder) and not (failed and _is_launched() and _holds_run(folder)):
        with contextlib.suppress(OSError):
            (folder / _CLAIM).unlink()
            folder.rmdir()


def _candidates(root: Path, name: str) -> Iterator[int]:
    """The numbers up to the first whose folder is missing."""
    number = 1
    while (root / folder_name(name, number)).is_dir():
        yield number
        number += 1


def _holds_run(folder: Path) -> bool:
    return any((folder / file).exists() for file in RUN_FILES)


def _claim(folder: Path) -> bool:
    """Whether the folder is this run's, from now on or before."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{_CLAIM}-{secrets.token_hex(4)}"
    owner = {"run": _run(), "host": socket.gethostname(), "pid": os.getpid(), "parent": os.getppid()}
    temporary.write_text(json_text(owner), encoding="utf-8")
    try:
        for _ in range(100):
            try:
                os.link(temporary, folder / _CLAIM)  # whole, and only where there is none
                return True
            except FileExistsError:
                if _claimed_by_us(folder):
                    return True
                if not _is_stale(_read(folder)):
                    return False
                (folder / _CLAIM).unlink(missing_ok=True)
        return False
    finally:
        temporary.unlink(missing_ok=True)


def _claimed_by_us(folder: Path) -> bool:
    owner = _read(folder)
    if owner.get("run") != _run():
        return False
    # A launcher may call a later run as it called this one: then the earlier one's launcher is gone, or its files tell.
    return not _holds_run(folder) or owner.get("host") != socket.gethostname() or _lives(owner.get("parent"))


def _is_stale(owner: Mapping[str, Any]) -> bool:
    """Its process is gone: then so is the run, which had not begun."""
    return not owner or (owner.get("host") == socket.gethostname() and not _lives(owner.get("pid")))


def _read(folder: Path) -> dict[str, Any]:
    try:
        owner = json.loads((folder / _CLAIM).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _lives(pid: object) -> bool:
    try:
        os.kill(int(str(pid)), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _run() -> str:
    """What all processes of this run, and no other run that lives, call it: where their launcher lets them meet."""
    told = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")]
    if _is_launched():
        return " ".join(told)
    return f"{socket.gethostname()} {os.getpid()}"


def _is_launched() -> bool:
    return "RANK" in os.environ and bool(os.environ.get("MASTER_PORT"))


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def check_experiment_name(name: str | None) -> None:
    """It is one folder's name, so that all of a run's files lie below its own folder."""
    if name is not None and (name in ("", ".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > 255):
        raise ValueError(
            f"experiment_name is {name!r}; it must be the name of one folder, which is made below --save-path"
        )
