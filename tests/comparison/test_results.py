"""The comparison's report as data: JSON gives back what went in, and the summaries are the statistics module's."""

import dataclasses
import json
import statistics
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_report import sample_report

from unlocked.comparison.results import Contender, Report, Run, Spread, StepSplit

_FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def _strategy(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's annotation, with short sequences."""
    if dataclasses.is_dataclass(kind):
        fields = {name: _strategy(hint) for name, hint in typing.get_type_hints(kind).items()}
        if kind is Report:
            fields["format"] = st.just(1)
        return st.builds(kind, **fields)
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return st.tuples(*map(_strategy, arguments))
    if origin is tuple:
        return st.lists(_strategy(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=3), _strategy(arguments[1]), max_size=2)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if arguments:
        return st.one_of([st.none() if a is type(None) else _strategy(a) for a in arguments])
    return {int: st.integers(), float: _FLOATS, str: st.text(max_size=3)}[kind]


@settings(max_examples=8, deadline=None)
@given(_strategy(Report))
def test_json_gives_back_what_went_in(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report


def _run(kind: str, rate: float, **more: Any) -> Run:
    values: dict[str, Any] = {
        "kind": kind,
        "seed": 0,
        "steps": 10,
        "train_seconds": 640 / rate,
        "setup_seconds": 0.1,
        "images_per_second": rate,
        "split": (StepSplit(data=0.0, compute=rate, wait=0.0, update=0.0),),
        "peak_memory_bytes": (100, int(rate)),
        "bubble_share": None,
        "energy_joules": None,
    }
    return Run(**values | more)


def _contender(*runs: Run) -> Contender:
    return Contender(name="x", family="LLS", engine="processes", processes=2, threads=1, status="measured", runs=runs)


def test_speed_comes_from_the_runs_without_evaluation() -> None:
    contender = _contender(_run("speed", 30.0), _run("accuracy", 5.0), _run("speed", 10.0), _run("speed", 20.0))
    spread = contender.images_per_second
    assert spread == Spread(median=20.0, low=10.0, high=30.0, mean=20.0, deviation=10.0, count=3)
    assert contender.split[0].compute == 20.0, "the split belongs to the median run"
    assert contender.peak_memory_bytes == (100, 30)
    assert contender.bubble_share is None
    assert contender.joules_per_image is None


def test_without_speed_runs_the_accuracy_runs_give_the_speed() -> None:
    spread = _contender(_run("accuracy", 5.0), _run("accuracy", 7.0)).images_per_second
    assert spread is not None
    assert (spread.mean, spread.deviation) == (6.0, statistics.stdev([5.0, 7.0]))


def test_energy_is_per_image() -> None:
    evaluated = _run("accuracy", 10.0, energy_joules=6400.0)  # evaluation's energy is not a training image's
    joules = _contender(evaluated, _run("speed", 10.0, energy_joules=1280.0)).joules_per_image
    assert joules is not None
    assert joules.median == pytest.approx(2.0)


@pytest.mark.parametrize("text", ["{}", "[]", json.dumps({"format": 2})])
def test_other_formats_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a report has the format 1"):
        Report.from_json(text)


def test_a_wrong_value_is_named_with_its_place() -> None:
    with pytest.raises(ValueError, match="report: Object missing required field `environment`"):
        Report.from_json('{"format": 1}')
    content = json.loads(sample_report().to_json())
    content["contenders"][2]["runs"][0]["steps"] = "many"
    with pytest.raises(ValueError, match=r"Expected `int`, got `str` - at `\$.contenders\[2\].runs\[0\].steps`"):
        Report.from_json(json.dumps(content))


def test_a_field_that_is_not_known_is_named(tmp_path: Path) -> None:
    content = json.loads(sample_report().to_json())
    content["settings"]["colour"] = "blue"
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"report.json: report.settings: unknown fields colour; valid: command"):
        Report.load(path)
