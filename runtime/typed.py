"""Typed records from plain data (what msgpack and JSON give back) and back: one reader for messages and reports.

The records are dataclasses; their annotations say what belongs where. No torch in it.
"""

from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

import msgspec

__all__ = ["from_plain", "to_plain"]

_T = TypeVar("_T")
_SCALARS = (str, bytes, int, float, type(None))  # in which nothing can be unknown


def to_plain(record: Any) -> Any:
    """A record as plain data: dataclasses become maps from field names, tuples and bytes stay what they are."""
    return msgspec.to_builtins(record, builtin_types=(bytes,))


def from_plain(kind: type[_T], value: Any, where: str) -> _T:
    """The inverse of `to_plain`, strictly: an int may stand for a float, nothing else is converted.

    Args:
        kind: a dataclass whose fields are numbers, str, bytes, Literals, optionals, tuples, dicts or such dataclasses.
        value: plain data; lists stand for tuples. Fields with a default may be left out.
        where: how the error calls the value.

    Raises:
        ValueError: one line that names the place: a value of another type, a field that is missing or unknown.
    """
    try:
        record = msgspec.convert(value, kind, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {error}") from error
    _refuse_unknown(record, value, where)
    return record


def _refuse_unknown(record: Any, value: Any, where: str) -> None:
    """msgspec passes over fields that a dataclass does not have."""
    if (names := _field_names(record.__class__)) is not None:
        if not value.keys() <= names.keys():
            unknown = sorted(map(str, value.keys() - names.keys()))
            raise ValueError(f"{where}: unknown fields {', '.join(unknown)}; valid: {', '.join(names)}")
        for name, given in value.items():
            if not isinstance(given, _SCALARS):
                _refuse_unknown(getattr(record, name), given, f"{where}.{name}")
    elif isinstance(record, tuple | list):
        for i, (item, given) in enumerate(zip(record, value, strict=True)):
            if not isinstance(given, _SCALARS):
                _refuse_unknown(item, given, f"{where}[{i}]")
    elif isinstance(record, dict):
        for key, item in record.items():
            _refuse_unknown(item, value[key], f"{where}[{key!r}]")


@cache
def _field_names(kind: Any) -> dict[str, None] | None:
    """In order; None: it is no dataclass."""
    return dict.fromkeys(field.name for field in fields(kind)) if is_dataclass(kind) else None
