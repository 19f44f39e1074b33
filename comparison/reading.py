"""Reads a result from its JSON file, whichever study wrote it."""

import json
from pathlib import Path
from typing import TypeVar

from unlocked.runtime.typed import from_plain

__all__ = ["read_record"]

_T = TypeVar("_T")


def read_record(kind: type[_T], path: Path, *, what: str, remedy: str) -> _T:
    """The dataclass `kind` that a JSON file holds.

    Args:
        what: how the error calls it.
        remedy: what makes the file anew.

    Raises:
        ValueError: no JSON, or other fields or values than those of `kind`; names the file, the place and the remedy.
        OSError: the file can't be read.
    """
    try:
        return from_plain(kind, json.loads(path.read_text(encoding="utf-8")), what)
    except ValueError as error:  # JSON's and Unicode's own are ValueErrors too
        raise ValueError(f"{path} is no {what} ({error}); make it anew with {remedy}") from None
