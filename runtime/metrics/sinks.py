"""Who hears of a run: the base class of all metrics sinks, and how several of them hear the same.

A sink of one's own derives from `MetricsSink`, overrides the methods that it needs and is handed to
`Trainer(sinks=[...])`: see `examples/own_sink.py`. `Dashboard`, `RunLog`, `TensorBoard` and `BestWeights` are sinks.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Mapping

from unlocked.runtime.metrics.records import EpochResult, RunInfo, StageProgress, StepResult

__all__ = ["FanOut", "MetricsSink"]


class MetricsSink:
    """Receives the records of a run. Every method does nothing: override the ones you need.

    Of every run, on every engine, a sink hears `on_start` first; then the records, in order; then exactly one of
    `on_finish` and `on_failure`; and `close` once, as the last call. A run that fails in its set-up, after the sinks
    were made, may skip `on_start`. With `processes` the sinks live in rank 0's process; if that process itself dies by
    force, nobody is left to tell them.

    Calls come one at a time, but not always from the same thread. They must return quickly: with the engines of one
    process they come between two micro-batches. No call can change a result: an exception in `on_start` stops the run
    before its first micro-batch (a user's mistake); after any later one the sink is named on standard error and hears
    only `close` from then on, while the run goes on.
    """

    def on_start(self, info: RunInfo) -> None:
        """Before the first position. The only method whose exception stops the run."""

    def on_progress(self, progress: StageProgress) -> None:
        """Now and then, for one stage; may be lost."""

    def on_step(self, step: StepResult) -> None:
        """Every `print_freq` training steps."""

    def on_epoch(self, result: EpochResult) -> None:
        """Once per epoch, in order."""

    def on_message(self, text: str) -> None:
        """One line for the user."""

    def on_finish(self, summary: Mapping[str, object]) -> None:
        """After the last position, also after an orderly stop; the run's figures (`RunResult.figures`)."""

    def on_failure(self, error: BaseException) -> None:
        """The run has failed, here or in another process (`RunFailed`), or was interrupted; `fit` raises the error."""

    def close(self) -> None:
        """The last call: give back what is held, such as files or the terminal. Calling it again does nothing."""


class FanOut(MetricsSink):
    """A sink that passes everything to several sinks, one call at a time, and keeps the promises of `MetricsSink`.

    A sink that raises after the start is reported once on standard error and dropped: metrics never fail a run.
    As a context manager it tells its sinks of an error that leaves the block, and closes them in any case.
    """

    def __init__(self, sinks: Iterable[MetricsSink] = ()) -> None:
        self._sinks = list(sinks)
        self._off: set[int] = set()  # places in the list of those that were dropped
        self._ended = self._closed = False
        self._lock = threading.Lock()

    def add(self, sinks: Iterable[MetricsSink]) -> None:
        """Before `on_start`."""
        self._sinks.extend(sinks)

    def on_start(self, info: RunInfo) -> None:
        with self._lock:
            for sink in self._sinks:
                sink.on_start(info)

    def on_progress(self, progress: StageProgress) -> None:
        self._tell(lambda sink: sink.on_progress(progress))

    def on_step(self, step: StepResult) -> None:
        self._tell(lambda sink: sink.on_step(step))

    def on_epoch(self, result: EpochResult) -> None:
        self._tell(lambda sink: sink.on_epoch(result))

    def on_message(self, text: str) -> None:
        self._tell(lambda sink: sink.on_message(text))

    def on_finish(self, summary: Mapping[str, object]) -> None:
        self._tell(lambda sink: sink.on_finish(summary), ends=True)

    def on_failure(self, error: BaseException) -> None:
        """Nothing if the run has ended already: the first end counts."""
        self._tell(lambda sink: sink.on_failure(error), ends=True)

    def close(self) -> None:
        with self._lock:
            closed, self._closed, self._ended = self._closed, True, True
            if not closed:
                for place, sink in enumerate(self._sinks):
                    self._call(place, sink, lambda sink: sink.close())

    def __enter__(self) -> "FanOut":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.on_failure(error)
        self.close()

    def _tell(self, call: Callable[[MetricsSink], None], *, ends: bool = False) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = ends
            for place, sink in enumerate(self._sinks):
                if place not in self._off:
                    self._call(place, sink, call)

    def _call(self, place: int, sink: MetricsSink, call: Callable[[MetricsSink], None]) -> None:
        try:
            call(sink)
        except Exception as error:  # a sink is an extra: whatever breaks in it must not break the run
            name = type(sink).__name__
            print(f"metrics: {name} is off after {type(error).__name__}: {error}", file=sys.stderr)
            self._off.add(place)
