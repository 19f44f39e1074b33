"""What sinks are promised: who hears what, how often, and that nothing in them changes a run."""

from collections.abc import Mapping
from typing import Any

import pytest
from engine_runs import fit, trainer
from torch import Tensor

from unlocked.rules import LayerInfo, LocalRule
from unlocked.runtime import MetricsSink
from unlocked.runtime.metrics.records import EpochResult, RunInfo, StageProgress, StepResult
from unlocked.runtime.metrics.sinks import FanOut

INFO = RunInfo(
    model="m",
    dataset="d",
    engine="sequential",
    rule="LLS",
    stages=(("a", "b"), ("c",)),
    total=10,
    epochs=1,
    steps_per_epoch=10,
    batch_size=1,
)


class Notes(MetricsSink):
    """A sink that notes every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def on_start(self, info: RunInfo) -> None:
        self.calls.append(("start", info))

    def on_progress(self, progress: StageProgress) -> None:
        self.calls.append(("progress", progress))

    def on_step(self, step: StepResult) -> None:
        self.calls.append(("step", step))

    def on_epoch(self, result: EpochResult) -> None:
        self.calls.append(("epoch", result))

    def on_message(self, text: str) -> None:
        self.calls.append(("message", text))

    def on_finish(self, summary: Mapping[str, object]) -> None:
        self.calls.append(("finish", summary))

    def on_failure(self, error: BaseException) -> None:
        self.calls.append(("failure", error))

    def close(self) -> None:
        self.calls.append(("close", None))


class Broken(Notes):
    def on_message(self, text: str) -> None:
        super().on_message(text)
        raise RuntimeError("disk full")


class Refusing(Notes):
    def on_start(self, info: RunInfo) -> None:
        raise ValueError("this folder holds a run")


class AlwaysBroken(MetricsSink):
    """Raises in the method that it is told to."""

    def __init__(self, method: str) -> None:
        setattr(self, method, self._fail)

    def _fail(self, *_: object) -> None:
        raise RuntimeError("disk full")


class Raising(LocalRule):
    """A layer's rule that breaks in the middle of a run: once it is armed."""

    armed = False

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        if Raising.armed:
            raise RuntimeError("the rule broke")
        return activations.square().mean()


class Arming(MetricsSink):
    def on_step(self, step: StepResult) -> None:
        Raising.armed = True


def test_a_broken_sink_is_reported_once_and_only_closed(capsys: pytest.CaptureFixture[str]) -> None:
    broken, healthy = Broken(), Notes()
    with FanOut([broken, healthy]) as sinks:
        sinks.on_start(INFO)
        sinks.on_message("one")
        sinks.on_message("two")
        sinks.on_finish({"images": 1})
    messages = [("message", "one"), ("message", "two")]
    assert healthy.calls == [("start", INFO), *messages, ("finish", {"images": 1}), ("close", None)]
    assert broken.calls == [("start", INFO), ("message", "one"), ("close", None)]
    assert capsys.readouterr().err == "metrics: Broken is off after RuntimeError: disk full\n"


def test_a_mistake_at_the_start_stops_the_run() -> None:
    with pytest.raises(ValueError, match="holds a run"):
        FanOut([Refusing()]).on_start(INFO)


def test_an_error_is_told_once_and_nothing_comes_after_it() -> None:
    notes = Notes()
    sinks = FanOut([notes])
    sinks.on_start(INFO)
    with pytest.raises(KeyboardInterrupt), sinks:
        raise KeyboardInterrupt
    sinks.on_message("late")
    sinks.on_failure(ValueError("another"))
    sinks.on_finish({})
    sinks.close()
    assert notes.names == ["start", "failure", "close"]
    assert isinstance(notes.calls[1][1], KeyboardInterrupt)


def test_sinks_in_sinks_hear_the_same() -> None:
    notes = Notes()
    with FanOut() as outer:
        outer.add([notes])
        with FanOut([outer]) as inner:
            inner.on_start(INFO)
            inner.on_finish({})
    assert notes.names == ["start", "finish", "close"]


ENGINES = [("sequential", {}), ("streams", {"stages": 3})]


@pytest.mark.parametrize(("engine", "options"), ENGINES)
def test_a_run_ends_with_its_figures_and_a_close(engine: str, options: dict[str, Any]) -> None:
    notes = Notes()
    result = fit(trainer(engine, sinks=[notes], **options))
    names = notes.names
    assert names[0] == "start"
    assert names[-2:] == ["finish", "close"]
    assert sorted(set(names)) == ["close", "epoch", "finish", "progress", "start", "step"]
    assert [names.count(name) for name in ("start", "epoch", "finish", "close")] == [1, 2, 1, 1]
    assert notes.calls[-2][1] == result.figures()


@pytest.mark.parametrize(("engine", "options"), ENGINES)
def test_a_run_that_fails_says_so_to_its_sinks(
    engine: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Raising, "armed", False)
    notes = Notes()
    with pytest.raises(Exception, match="the rule broke") as caught:
        fit(trainer(engine, Raising, sinks=[notes, Arming()], print_freq=1, **options))
    assert notes.names[0] == "start"
    assert notes.names[-2:] == ["failure", "close"]
    assert [notes.names.count(name) for name in ("start", "finish", "failure", "close")] == [1, 0, 1, 1]
    assert notes.calls[-2][1] is caught.value


@pytest.mark.parametrize(("engine", "options"), ENGINES)
def test_a_run_that_a_sink_refuses_closes_the_others(engine: str, options: dict[str, Any]) -> None:
    notes = Notes()
    with pytest.raises(ValueError, match="holds a run"):
        fit(trainer(engine, sinks=[notes, Refusing()], **options))
    assert notes.names == ["start", "failure", "close"]


@pytest.mark.parametrize(("engine", "options"), ENGINES)
def test_no_sink_changes_a_result(engine: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    expected = fit(trainer(engine, **options))
    methods = ("on_progress", "on_step", "on_epoch", "on_finish", "close")
    notes = Notes()
    got = fit(trainer(engine, sinks=[*map(AlwaysBroken, methods), notes], **options))
    assert got.weights_sha256 == expected.weights_sha256
    assert notes.names[-2:] == ["finish", "close"]
    assert capsys.readouterr().err.count("metrics: AlwaysBroken is off after RuntimeError: disk full") == len(methods)


def test_a_sink_needs_no_method_at_all() -> None:
    assert fit(trainer(sinks=[MetricsSink()]), epochs=1).epochs


def test_the_function_that_makes_sinks_is_called_once() -> None:
    made: list[Notes] = []

    def make() -> list[Notes]:
        made.append(Notes())
        return made

    fit(trainer(sinks=make), epochs=1)
    (notes,) = made
    assert notes.names[-1] == "close"
