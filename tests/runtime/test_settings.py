"""Settings: one place for defaults, bounds, help and flags; engines own their options."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import fit, trainer

from unlocked import LLS, Processes, Sequential, Streams, Trainer
from unlocked.models import small_conv
from unlocked.runtime.engines import ENGINES, as_engine, engine_class
from unlocked.runtime.fields import LineParser, add_flags, check, flag_of, saved, setting, setting_names, values_of
from unlocked.runtime.settings import Settings

SGD = partial(torch.optim.SGD, lr=0.1)


@dataclass(frozen=True, kw_only=True)
class Example:
    count: int = setting(3, "how many", at_least=1, at_most=9)
    share: float = setting(0.5, "of the whole", above=0, below=1)
    kind: str = setting("a", "which", choices=("a", "b"))
    names: tuple[int, ...] = setting((), "several", flag=("-n", "--names"))
    where: Path | None = setting(None, "a file")
    parts: int | str | None = setting(None, "number or list", at_least=1)
    fast: bool = setting(True, "be fast", off="be slow")
    loud: bool = setting(False, "be loud")
    hidden: int = setting(0, "not a flag", is_flag=False)

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"count": 0}, "count is 0; it must be at least 1 and at most 9"),
        ({"count": 10}, "count is 10; it must be at least 1 and at most 9"),
        ({"count": 2.5}, "count is 2.5; it must be a whole number"),
        ({"count": True}, "count is True; it must be a whole number"),
        ({"count": None}, "count is None; it must be a whole number"),
        ({"share": 0}, "share is 0; it must be positive and below 1"),
        ({"share": 1.0}, "share is 1.0; it must be positive and below 1"),
        ({"share": float("nan")}, "share is nan; it must be positive and below 1"),
        ({"share": "much"}, "share is 'much'; it must be a number"),
        ({"kind": "c"}, "kind 'c' is not known; valid: a, b"),
        ({"names": (1, "x")}, "it must be a tuple of whole numbers"),
        ({"where": 3}, "where is 3; it must be a path or None"),
        ({"parts": 0}, "parts is 0; it must be at least 1"),
        ({"fast": 1}, "fast is 1; it must be True or False"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_valid(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Example(**given)


def test_what_is_valid_is_taken() -> None:
    given: dict[str, Any] = {"count": 9, "share": 0.1, "kind": "b", "names": [1, 2], "where": "file", "parts": "0-1,2"}
    one = Example(**given)
    assert (one.names, one.where) == ((1, 2), Path("file"))
    assert saved(one)["where"] == "file"
    assert values_of(one)["where"] == Path("file")
    assert values_of(one, Example) == values_of(one)


def test_flags_give_what_the_dataclass_takes() -> None:
    parser = LineParser()
    add_flags(parser.add_argument_group("all"), Example)

    def parse(flags: str) -> Example:
        return Example(**vars(parser.parse_args(flags.split())))

    assert parse("") == Example()
    assert parse("--no-fast --loud -n 1 2 --parts 3") == Example(fast=False, loud=True, names=(1, 2), parts=3)
    assert parse("--names 4 --parts 0-1,2 --where ~/x").where == Path("~/x").expanduser()
    assert (flag_of(Example, "fast"), flag_of(Example, "names")) == ("--no-fast", "--names")
    text = parser.format_help()
    for words in ("how many (default: 3)", "be slow", "be loud", "-n", "of the whole (default: 0.5)"):
        assert words in text
    assert "hidden" not in text
    for mistake in ("--count many", "--hidden 3", "--nothing"):
        with pytest.raises(ValueError, match="see --help") as error:
            parse(mistake)
        assert len(str(error.value).splitlines()) == 1


def test_some_of_the_flags() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser.add_argument_group("some"), Example, {"count"})
    assert vars(parser.parse_args(["--count", "4"])) == {"count": 4}
    assert "--share" not in parser.format_help()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"print_freq": 0}, "print_freq is 0; it must be at least 1"),
        ({"prefetch": -1}, "prefetch is -1; it must be at least 0"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"timeout": 0.0}, "timeout is 0.0; it must be positive"),
        ({"statistics_batches": -1}, "statistics_batches is -1"),
        ({"snapshot_every": -1}, "snapshot_every is -1"),
        ({"kernels": "metal"}, "valid: auto, torch, triton, cuda, cpp"),
        ({"precision": "fp8"}, "valid: fp32, tf32, bf16"),
        ({"seed": "one"}, "seed is 'one'; it must be a whole number"),
    ],
)
@pytest.mark.parametrize("make", [Settings, trainer])
def test_settings_are_checked_wherever_they_are_given(make: Callable[..., Any], given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make(**given)


def test_the_trainer_holds_its_settings() -> None:
    one = trainer("streams", seed=7, print_freq=3, trace="t.json")
    assert one.settings == Settings(seed=7, print_freq=3, statistics_batches=2, trace=Path("t.json"))
    assert replace(one, seed=8).settings == replace(one.settings, seed=8)


@pytest.mark.parametrize(
    ("name", "value", "engine", "words"),
    [
        ("stages", 3, "sequential", "engine=Streams(stages=3)"),
        ("stages", 3, "processes", "engine=Processes(stages=3)"),
        ("graph_ticks", 5, "processes", "engine=Streams(graph_ticks=5)"),
        ("pin", False, "sequential", "engine=Processes(pin=False)"),
        ("start_timeout", 9.0, "processes", "engine=Processes(start_timeout=9.0)"),
        ("transport", "group", "streams", "engine=Processes(transport='group')"),
    ],
)
def test_the_trainer_says_where_an_option_went(name: str, value: Any, engine: str, words: str) -> None:
    given: dict[str, Any] = {"rule": LLS(), "optimizer": SGD, "engine": engine, name: value}
    with pytest.raises(TypeError) as error:
        Trainer(small_conv(3, 5, 16), **given)
    assert f"{name} is an option of an engine" in str(error.value)
    assert words in str(error.value)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'sed'"):
        trainer(sed=3)


@pytest.mark.parametrize("owner", ENGINES)
@pytest.mark.parametrize("other", ENGINES)
def test_every_option_is_refused_by_the_engines_without_it(owner: str, other: str) -> None:
    for one in fields(engine_class(owner)):
        given = {one.name: one.default}
        if one.name in setting_names(engine_class(other)):
            assert getattr(engine_class(other)(**given), one.name) == one.default
        else:
            with pytest.raises(TypeError, match=one.name):
                engine_class(other)(**given)


def test_a_string_is_the_engine_with_its_defaults() -> None:
    assert as_engine("sequential") == Sequential()
    assert as_engine("streams") == Streams()
    assert as_engine("processes") == Processes()
    assert as_engine(Processes(start_timeout=600)) == Processes(start_timeout=600)
    assert fit(trainer("streams"), max_steps=3).weights_sha256 == _sha256("streams") == _sha256(Streams(stages=2))
    for wrong in (Streams, 3, None):
        with pytest.raises(ValueError, match="give one of Sequential"):
            as_engine(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="engine 'threads' is not known; valid: sequential, streams, processes"):
        as_engine("threads")


def _sha256(engine: Any) -> str:
    one = Trainer(small_conv(3, 5, 16, dropout=0.2), rule=LLS(), optimizer=partial(torch.optim.Adam, lr=1e-2),
                  engine=engine, seed=5, statistics_batches=2)  # fmt: skip
    return fit(one, max_steps=3).weights_sha256


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Streams(queue_depth=0), "queue_depth is 0; it must be at least 1"),
        (lambda: Streams(stages=0), "stages is 0; it must be at least 1"),
        (lambda: Streams(graph_ticks=-1), "graph_ticks is -1; it must be at least 0"),
        (lambda: Streams(green_contexts="on"), "green_contexts 'on' is not known; valid: off, sms, queues"),
        (lambda: Processes(queue_depth=0), "queue_depth is 0; it must be at least 1"),
        (lambda: Processes(transport="pigeon"), "transport 'pigeon' is not known; valid: auto, shared, group"),
        (lambda: Processes(start_timeout=0), "start_timeout is 0; it must be positive"),
        (lambda: Processes(coordinator_port=70000), "coordinator_port is 70000; it must be at least 0 and at most"),
    ],
)
def test_engines_check_their_options(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()
