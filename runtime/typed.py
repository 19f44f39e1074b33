"""Typed records from plain data (what msgpack and JSON give back) and back: one reader for messages and reports.

The records are dataclasses; their annotations say what belongs where. No torch in it.
"""

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import msgspec

__all__ = ["from_plain", "to_plain"]

_T = TypeVar("_T")


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
    if is_dataclass(record):
        names = [field.name for field in fields(record)]
        if unknown := sorted(map(str, value.keys() - set(names))):
            raise ValueError(f"{where}: unknown fields {', '.join(unknown)}; valid: {', '.join(names)}")
        for name in value:
            _refuse_unknown(getattr(record, name), value[name], f"{where}.{name}")
    elif isinstance(record, tuple | list):
        for i, (item, given) in enumerate(zip(record, value, strict=True)):
            _refuse_unknown(item, given, f"{where}[{i}]")
    elif isinstance(record, dict):
        for key, item in record.items():
            _refuse_unknown(item, value[key], f"{where}[{key!r}]")
