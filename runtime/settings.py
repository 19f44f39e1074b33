"""A setting is written once: type, default, help and bounds stand at a field of a dataclass; checks, flags and the
saved config are made from there.

tyro and jsonargparse were considered: neither makes the authors' flags (`-m 50 80`, `--milestone 50 80`) from plain
dataclasses with mistakes of one line, so this is a thin layer of our own over dataclasses and argparse.
"""

import argparse
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Union, get_args, get_origin

__all__ = ["LineParser", "Settings", "add_flags", "check", "flag_of", "saved", "setting", "setting_names", "values_of"]


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | Callable[[], Sequence[str]] = (),
    flag: str | Sequence[str] | None = None,
    is_flag: bool = True,
    off: str = "",
) -> Any:
    """A field of a settings dataclass.

    Args:
        help: one line, for the command line and for readers.
        at_least, above, at_most, below: bounds of a number; None as a value is outside of bounds.
        choices: the valid names, or a function that imports what knows them.
        flag: how it is called on the command line; default: `--the-name`, or `--no-the-name` if True is the default.
        is_flag: False: the command line sets it in another way.
        off: the help of the flag that turns off what is True by default.
    """
    spec = _Spec(help, at_least, above, at_most, below, choices, flag, is_flag, off)
    return field(default=default, metadata={_KEY: spec})


def check(instance: Any) -> None:
    """Holds every setting of a dataclass's instance to its type, bounds and choices; a path may come as a string, a
    tuple as a list.

    Raises:
        ValueError: names the field, its value, and what is valid.
    """
    for one in _settings(type(instance)):
        value = getattr(instance, one.name)
        if isinstance(value, str) and Path in _kinds(one):
            object.__setattr__(instance, one.name, Path(value))
        elif isinstance(value, list) and _row_of(one) is not None:
            object.__setattr__(instance, one.name, tuple(value))
        elif value is not None or type(None) not in _kinds(one):
            _check_value(one, value)


def flag_of(owner: type, name: str) -> str:
    """What the setting `name` of the dataclass `owner` is called on the command line."""
    return _flags(next(one for one in _settings(owner) if one.name == name))[-1]


def add_flags(group: argparse._ArgumentGroup, owner: type, names: Collection[str] | None = None) -> None:
    """Adds the flags of a dataclass's settings, or of those called `names`, to a group of a parser.

    What is not given on the command line is not in the parsed namespace: defaults are the dataclass's business.
    """
    for one in _settings(owner):
        if _spec(one).is_flag and (names is None or one.name in names):
            group.add_argument(*_flags(one), dest=one.name, default=argparse.SUPPRESS, **_form(one))


def setting_names(owner: type) -> set[str]:
    """What the settings of a dataclass are called."""
    return {one.name for one in _settings(owner)}


def values_of(instance: Any, owner: type | None = None) -> dict[str, Any]:
    """The settings of `instance` that the dataclass `owner` has (default: all of them), by name."""
    return {one.name: getattr(instance, one.name) for one in _settings(owner or type(instance))}


def saved(instance: Any) -> dict[str, Any]:
    """The same as JSON values, for a run's config."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in values_of(instance).items()}


class LineParser(argparse.ArgumentParser):
    """Raises a ValueError of one line where argparse would print its usage and exit."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(f"{message}; see --help")


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


def _check_value(one: Field[Any], value: Any) -> None:
    spec = _spec(one)
    if not any(_is_a(value, kind) for kind in _kinds(one)):
        valid = " or ".join(_WORDS.get(kind, str(kind)) for kind in _kinds(one))
        raise ValueError(f"{one.name} is {value!r}; it must be {valid}")
    if isinstance(value, str) and (names := spec.names()) and value not in names:
        raise ValueError(f"{one.name} {value!r} is not known; valid: {', '.join(names)}")
    bounds = spec.bounds()
    if isinstance(value, Real) and not all(test(value, bound) for _, bound, test in bounds):
        valid = " and ".join(
            "positive" if (words, bound) == ("above", 0) else f"{words} {bound:g}" for words, bound, _ in bounds
        )
        raise ValueError(f"{one.name} is {value}; it must be {valid} ({spec.help})")


_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    Path: "a path",
    type(None): "None",
    tuple[int, ...]: "a tuple of whole numbers",
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


def _form(one: Field[Any]) -> dict[str, Any]:
    """How argparse reads the setting, and its help."""
    kinds, text = _kinds(one), _spec(one).help
    if one.default is True:
        return {"action": "store_false", "help": _spec(one).off or text}
    if bool in kinds:
        return {"action": "store_true", "help": text}
    if one.default not in (None, "", ()):
        text += f" (default: {one.default})"
    if (kind := _row_of(one)) is not None:
        return {"type": kind, "nargs": "+", "help": text}
    if int in kinds and str in kinds:
        return {"type": _number_or_text, "help": text}
    known = {int: int, float: float, str: str, Path: _path}
    return {"type": next(known[kind] for kind in kinds if kind in known), "help": text}


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _backends() -> Sequence[str]:
    from unlocked.kernels.dispatch import BACKENDS

    return BACKENDS


def _precisions() -> Sequence[str]:
    from unlocked.kernels.precision import PRECISIONS

    return PRECISIONS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to run, on any engine; nothing here changes a result, save `seed`, and `precision`, `kernels`, `device`,
    `compile` and `threads` by rounding."""

    seed: int = setting(0, "keys initialisation, shuffling, augmentation and dropout")
    device: str = setting("cpu", "cpu, cuda or cuda:INDEX")
    kernels: str = setting("auto", "auto, torch, cpp (CPU), triton or cuda (GPU)", choices=_backends)
    precision: str = setting(
        "fp32", "fp32, tf32 (GPU) or bf16; weights, optimizer and statistics stay float32", choices=_precisions
    )
    compile: bool | str = setting(
        False, "torch.compile for what trains through autograd (all of BP); in Python a string names its backend"
    )
    print_freq: int = setting(50, "training micro-batches between two readings of the losses", at_least=1)
    statistics_batches: int = setting(
        50, "training micro-batches that re-estimate BatchNorm's statistics before an evaluation", at_least=0
    )
    snapshot_every: int = setting(0, "training micro-batches between snapshots (0: none)", at_least=0)
    snapshot_dir: Path | None = setting(None, "folder of the snapshots; a stopped run writes one too", is_flag=False)
    keep_snapshots: int | None = setting(None, "newest snapshots to keep; unless given: all", at_least=1)
    resume: Path | None = setting(
        None,
        "go on from the newest snapshot in this folder, on any engine and number of stages; rule, optimizer, seed and "
        "batch sizes must be the run's; auto: from the newest whole one of this run's own folder, or anew",
    )
    trace: Path | None = setting(None, "write a Chrome trace of every action here")
    timeout: float = setting(300.0, "seconds that a stage waits for a neighbour, or for its data", above=0)
    prefetch: int | None = setting(
        None,
        "micro-batches that a thread assembles ahead of stage 0 on the host (0: none); unless given: a few for data "
        "that is streamed and between processes on a CPU, else none",
        at_least=0,
    )
    threads: int | None = setting(
        None,
        "intra-op threads of each process; unless given: torch's choice. Equal results need equal counts",
        at_least=1,
    )
    best_dir: Path | None = setting(
        None, "keep the weights of the best evaluation here, as model_best.pt", is_flag=False
    )

    def __post_init__(self) -> None:
        check(self)

    @property
    def resumes_by_itself(self) -> bool:
        """The same settings begin a run and go on with it."""
        return self.resume == Path("auto")
