"""A setting is written once: type, default, help and bounds stand at a field of a dataclass; checks, flags and the
saved config are made from there.

tyro and jsonargparse were considered: neither makes the authors' flags (`-m 50 80`, `--milestone 50 80`) from plain
dataclasses with mistakes of one line, so this is a thin layer of our own over dataclasses and argparse.
"""

import argparse
import math
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, Union, get_args, get_origin

from unlocked.runtime.line_parser import LineParser
from unlocked.runtime.paths import Place, checked_path

__all__ = [
    "LARGEST",
    "LARGEST_SEED",
    "LONGEST_WAIT",
    "LineParser",
    "add_flags",
    "check",
    "checked_value",
    "choices_of",
    "flag_of",
    "from_environment",
    "saved",
    "setting",
    "setting_names",
    "values_of",
]

_T = TypeVar("_T")

LARGEST = 2**31 - 1
"""Of a count of rows, steps or epochs: more than any run has, and no operation on it leaves 64 bits."""
LARGEST_SEED = 2**64 - 1
"""A larger seed would be cut to its last 64 bits: it would be another one's."""
LONGEST_WAIT = 1e6
"""Seconds: 11 days. What waits counts milliseconds in 32 bits (ZeroMQ's poll, 24 days)."""


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | Callable[[], Sequence[str]] = (),
    flag: str | Sequence[str] | None = None,
    is_flag: bool = True,
    off: str = "",
    place: Place = "",
    variable: str = "",
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: none: the field must be given.
        help: one line, for the command line and for readers.
        at_least, above, at_most, below: bounds of a number, or of each in a tuple; None as a value is outside of
            bounds. A number is finite whatever they say.
        choices: the valid names, or a function that imports what knows them.
        flag: how it is called on the command line; default: `--the-name`, or `--no-the-name` if True is the default.
        is_flag: False: the command line sets it in another way.
        off: the help of the flag that turns off what is True by default.
        place: what a path is for, see `unlocked.runtime.paths`.
        variable: of the environment, which gives the value to `from_environment`.
    """
    spec = _Spec(help, at_least, above, at_most, below, choices, flag, is_flag, off, place, variable)
    return field(default=default, metadata={_KEY: spec})


def check(instance: Any) -> None:
    """Holds every setting of a dataclass's instance to its type, bounds, choices and place.

    A path may come as a string, a tuple as a list, a number as NumPy's; the instance holds the plain value.

    Raises:
        ValueError: names the field, its value, and what is valid.
    """
    for one in _settings(type(instance)):
        value = getattr(instance, one.name)
        checked = _checked(one, value)
        if checked is not value:
            object.__setattr__(instance, one.name, checked)


def from_environment(owner: type[_T], environment: Mapping[str, str]) -> _T:
    """An instance of a dataclass whose settings stand in variables of the environment.

    Raises:
        KeyError: a variable is not set, and its field has no default.
        ValueError: names the variable, its value, and what is valid.
    """
    values = {}
    for one in _settings(owner):
        variable = _spec(one).variable
        if variable in environment or one.default is MISSING:
            text = environment[variable].strip()
            if not text:
                raise ValueError(f"{variable} is empty; it must be {_valid_kinds(one)}")
            values[one.name] = _checked(one, _from_text(one, text), variable)
    return owner(**values)


def flag_of(owner: type, name: str) -> str:
    """What the setting `name` of the dataclass `owner` is called on the command line."""
    return _flags(next(one for one in _settings(owner) if one.name == name))[-1]


def choices_of(owner: type, name: str) -> Sequence[str]:
    """The valid names of the setting `name` of the dataclass `owner`; empty: any value of its type may do."""
    return next(_spec(one) for one in _settings(owner) if one.name == name).names()


def add_flags(
    group: argparse._ArgumentGroup,
    owner: type,
    names: Collection[str] | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Adds the flags of a dataclass's settings, or of those called `names`, to a group of a parser.

    What is not given on the command line is not in the parsed namespace: defaults are the dataclass's business, but for
    those that a command has of its own, `defaults` by the settings' names.
    """
    for one in _settings(owner):
        if _spec(one).is_flag and (names is None or one.name in names):
            default = defaults.get(one.name, argparse.SUPPRESS)
            group.add_argument(*_flags(one), dest=one.name, default=default, **_form(one, defaults))


def setting_names(owner: type) -> set[str]:
    """What the settings of a dataclass are called."""
    return {one.name for one in _settings(owner)}


def values_of(instance: Any, owner: type | None = None) -> dict[str, Any]:
    """The settings of `instance` that the dataclass `owner` has (default: all of them), by name."""
    return {one.name: getattr(instance, one.name) for one in _settings(owner or type(instance))}


def saved(instance: Any) -> dict[str, Any]:
    """The same as JSON values, for a run's config."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in values_of(instance).items()}


def checked_value(owner: type, name: str, value: Any) -> Any:
    """`value` as the setting `name` of the dataclass `owner` holds it; a number may be written as text, as some files
    do.

    Raises:
        ValueError: names the setting, the value, and what is valid.
    """
    one = next(one for one in _settings(owner) if one.name == name)
    kinds = _kinds(one)
    if isinstance(value, str) and any(kind in (int, float) for kind in kinds) and not {str, bool} & set(kinds):
        value = _from_text(one, value)
    return _checked(one, value)


_KEY = "setting"


@dataclass(frozen=True)
class _Spec:
    """What `setting` was told."""

    help: str
    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None
    choices: Sequence[str] | Callable[[], Sequence[str]]
    flag: str | Sequence[str] | None
    is_flag: bool
    off: str
    place: Place
    variable: str

    def names(self) -> Sequence[str]:
        return self.choices() if callable(self.choices) else self.choices

    def bounds(self) -> list[tuple[str, float, Callable[[Any, float], bool]]]:
        """Words, bound and test of every bound that is set; a NaN passes none."""
        found: list[tuple[str, float | None, Callable[[Any, float], bool]]] = [
            ("at least", self.at_least, lambda value, bound: value >= bound),
            ("above", self.above, lambda value, bound: value > bound),
            ("at most", self.at_most, lambda value, bound: value <= bound),
            ("below", self.below, lambda value, bound: value < bound),
        ]
        return [(words, bound, test) for words, bound, test in found if bound is not None]


def _settings(owner: type) -> list[Field[Any]]:
    return [one for one in fields(owner) if _KEY in one.metadata]


def _spec(one: Field[Any]) -> _Spec:
    spec: _Spec = one.metadata[_KEY]
    return spec


def _kinds(one: Field[Any]) -> tuple[Any, ...]:
    """The types that a field's value may have."""
    assert not isinstance(one.type, str), f"{one.name}: write the type of a setting without quotes"
    return get_args(one.type) if get_origin(one.type) in (Union, types.UnionType) else (one.type,)


def _row_of(one: Field[Any]) -> Any:
    """The type of the elements where a setting is a tuple; else None."""
    return next((get_args(kind)[0] for kind in _kinds(one) if get_origin(kind) is tuple), None)


def _checked(one: Field[Any], value: Any, name: str = "") -> Any:
    """The value as its field's instance holds it; `name` is what to call it, if not as the field.

    Raises:
        ValueError: see `check`.
    """
    name, kinds, row = name or one.name, _kinds(one), _row_of(one)
    if value is None and type(None) in kinds:
        return None
    if Path in kinds and isinstance(value, str | Path):
        return checked_path(name, value, _spec(one).place)
    if row is not None and isinstance(value, list | tuple):
        value = tuple(_plain(part) for part in value)
        if all(_is_a(part, row) for part in value):
            for part in value:
                _check_value(name, one, part)
            return value
    value = _plain(value)
    if not any(_is_a(value, kind) for kind in kinds):
        raise ValueError(f"{name} is {_shown(value)}; it must be {_valid_kinds(one)}")
    _check_value(name, one, value)
    return value


def _check_value(name: str, one: Field[Any], value: Any) -> None:
    """Choices and bounds of a value that has its type."""
    spec = _spec(one)
    if isinstance(value, str) and (names := spec.names()) and value not in names:
        raise ValueError(f"{name} {_shown(value)} is not known; valid: {', '.join(filter(None, names))}")
    if isinstance(value, bool) or not isinstance(value, Real):
        return
    bounds = spec.bounds()
    if all(test(value, bound) for _, bound, test in bounds) and (isinstance(value, int) or math.isfinite(value)):
        return
    valid = " and ".join(
        "positive" if (words, bound) == ("above", 0) else f"{words} {_number(bound)}" for words, bound, _ in bounds
    )
    raise ValueError(f"{name} is {_shown(value)}; it must be {valid or 'finite'}{spec.help and f' ({spec.help})'}")


def _valid_kinds(one: Field[Any]) -> str:
    return " or ".join(_WORDS.get(kind, str(kind)) for kind in _kinds(one))


def _plain(value: Any) -> Any:
    """A number of NumPy's, or of another library, as Python's own, which JSON knows; anything else as it is."""
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _shown(value: Any) -> str:
    """A value in an error's one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


_MOST_SHOWN = 80  # characters
_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    Path: "a path",
    type(None): "None",
    tuple[int, ...]: "a tuple of whole numbers",
    tuple[str, ...]: "a tuple of strings",
}


def _is_a(value: Any, kind: Any) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(one, get_args(kind)[0]) for one in value)
    return isinstance(value, kind)


def _flags(one: Field[Any]) -> tuple[str, ...]:
    flag = _spec(one).flag
    if isinstance(flag, str):
        return (flag,)
    dashed = one.name.replace("_", "-")
    return tuple(flag) if flag is not None else (f"--no-{dashed}" if one.default is True else f"--{dashed}",)


def _form(one: Field[Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """How argparse reads the setting, and its help."""
    kinds, text, default = _kinds(one), _spec(one).help, defaults.get(one.name, one.default)
    if one.default is True:
        return {"action": "store_false", "help": _spec(one).off or text}
    if bool in kinds:
        return {"action": "store_true", "help": text}
    if default not in (None, "", (), MISSING):
        text += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
    form: dict[str, Any] = {"help": text, "metavar": _metavar(one)}
    if (kind := _row_of(one)) is not None:
        return {**form, "type": kind, "nargs": "+"}
    if int in kinds and str in kinds:
        return {**form, "type": _number_or_text}
    return {**form, "type": next(_PARSED[kind] for kind in kinds if kind in _PARSED)}


def _metavar(one: Field[Any]) -> str:
    """What the help calls the value."""
    kinds = (*_kinds(one), _row_of(one))
    if Path in kinds:
        return "FILE" if _spec(one).place in ("file", "new file", "JSON file") else "DIR"
    return "N" if int in kinds else "X" if float in kinds else "NAME" if _spec(one).choices else "TEXT"


_PARSED: Mapping[Any, Callable[[str], Any]] = {int: int, float: float, str: str, Path: str}
"""Type of a setting -> what makes its value of a command line's word; a path is made of its string by `check`."""


def _from_text(one: Field[Any], text: str) -> Any:
    """A variable's value as its field's type; the text itself, which `_checked` refuses, where it is none."""
    try:
        return next(_PARSED[kind] for kind in _kinds(one) if kind in _PARSED)(text)
    except ValueError:
        return text


def _number_or_text(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text
