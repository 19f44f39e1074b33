"""An exception's way from a worker to its supervisor, which raises it where the caller waits."""

import pickle
import traceback
from dataclasses import dataclass
from typing import Any

__all__ = ["pack_error", "unpack_error"]


class WorkerTrace(Exception):
    """The cause of a carried exception: where it was raised, in the worker, as text."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(text)

    def __str__(self) -> str:
        return f"\n{self.text}"


@dataclass(frozen=True, slots=True)
class _Packed:
    kind: type[BaseException]
    args: tuple[Any, ...]
    attributes: dict[str, Any]
    file: str | None


def pack_error(error: BaseException) -> bytes:
    """As much of it as can be carried: its nearest known class, its text, its attributes, the trace as text."""
    trace = "".join(traceback.format_exception(error)).rstrip()
    return pickle.dumps((_pack(error), trace))


def unpack_error(data: bytes) -> BaseException:
    """The inverse of `pack_error`."""
    packed, trace = pickle.loads(data)
    error = _unpack(packed)
    error.__cause__ = WorkerTrace(trace)
    return error


def _pack(error: BaseException) -> _Packed:
    kind: type[BaseException] = next(k for k in type(error).__mro__ if issubclass(k, BaseException) and _carries(k))
    args = tuple(arg if _carries(arg) else str(arg) for arg in error.args)
    if kind is not type(error) and not kind.__module__.startswith("unlocked"):
        args = (str(error),)
    attributes: dict[str, Any] = {}
    for name, value in vars(error).items():
        if isinstance(value, BaseException):
            attributes[name] = _pack(value)
        elif _carries(value):
            attributes[name] = value
    file = str(error.filename) if isinstance(error, OSError) and error.filename is not None else None
    return _Packed(kind, args, attributes, file)


def _unpack(packed: _Packed) -> BaseException:
    error = packed.kind.__new__(packed.kind, *packed.args)
    error.args = packed.args
    if isinstance(error, OSError):
        OSError.__init__(error, *packed.args)
        if packed.file is not None:
            error.filename = packed.file
    for name, value in packed.attributes.items():
        setattr(error, name, _unpack(value) if isinstance(value, _Packed) else value)
    return error


def _carries(value: object) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # whatever a class of the user's raises
        return False
    return True
