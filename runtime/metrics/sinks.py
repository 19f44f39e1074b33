"""Who hears of a run: the base class of all metrics sinks, and how several of them hear the same.

A sink of one's own derives from `MetricsSink`, overrides the methods that it needs and is handed to
`Trainer(sinks=[...])`: see `examples/own_sink.py`. `Dashboard`, `RunLog`, `TensorBoard`, `BestWeights`, `CsvFile` and
`EarlyStopping` are sinks.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Mapping

from unlocked.runtime.metrics.records import EpochResult, Metric, RunInfo, StageProgress, StepResult

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

    From inside any of these calls a sink may `stop` the run, and `tell` a figure of its own to all sinks.
    """

    waits_at_epochs: bool = False
    """True: no stage begins an epoch before this sink has heard the one before. So what it stops ends exactly there, on
    every engine and with the same weights; the price is that the pipeline drains at the end of every epoch."""
    _host: "FanOut | None" = None

    def stop(self, reason: str) -> None:
        """Asks for an orderly end: `fit` returns the result so far, with `reason` in `RunResult.stop_reason`.

        Without `waits_at_epochs` the run ends soon after, at a place that depends on how far ahead the stages are.

        Args:
            reason: one line for the user.

        Raises:
            RuntimeError: the sink belongs to no run that has begun.
        """
        self._hosted().stop(reason)

    def tell(self, name: str, value: float, *, epoch: int) -> None:
        """Hands a figure of this sink's own to all sinks of the run (`on_metric`), after the call that is under way.

        Raises:
            RuntimeError: the sink belongs to no run that has begun.
        """
        self._hosted().pass_on(Metric(name=name, value=float(value), epoch=epoch))

    def _hosted(self) -> "FanOut":
        if self._host is None:
            raise RuntimeError(f"{type(self).__name__} belongs to no run; hand it to Trainer(sinks=[...])")
        return self._host

    def on_start(self, info: RunInfo) -> None:
        """Before the first position. The only method whose exception stops the run."""

    def on_progress(self, progress: StageProgress) -> None:
        """Now and then, for one stage; may be lost."""

    def on_step(self, step: StepResult) -> None:
        """Every `print_freq` training steps."""

    def on_epoch(self, result: EpochResult) -> None:
        """Once per epoch, in order."""

    def on_metric(self, metric: Metric) -> None:
        """A figure that another sink tells, or this one."""

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
        self._sinks: list[MetricsSink] = []
        self._off: set[int] = set()  # places in the list of those that were dropped
        self._ended = self._closed = False
        self._lock = threading.Lock()
        self._metrics: list[Metric] = []
        self.stop_reason = ""
        """Why a sink has stopped the run; empty: none has."""
        self.on_stop: Callable[[str], object] = lambda reason: None
        """Called with the reason, from whatever thread the sink stops the run in."""
        self.add(sinks)

    def add(self, sinks: Iterable[MetricsSink]) -> None:
        """Before `on_start`."""
        for sink in sinks:
            self._sinks.append(sink)
            if isinstance(sink, MetricsSink):
                sink._host = self

    @property
    def waits(self) -> bool:
        """One of the sinks waits at the ends of epochs."""
        return any(sink.waits if isinstance(sink, FanOut) else sink.waits_at_epochs for sink in self._sinks)

    def stop(self, reason: str) -> None:
        """The first reason counts."""
        if self._host is not None:
            self._host.stop(reason)
        elif not self.stop_reason:
            self.stop_reason = reason or "a metrics sink has stopped the run"
            self.on_stop(self.stop_reason)

    def pass_on(self, metric: Metric) -> None:
        """Hands a sink's figure to all of them once the call that is under way has reached all."""
        if self._host is not None:
            self._host.pass_on(metric)
        else:
            self._metrics.append(metric)

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

    def on_metric(self, metric: Metric) -> None:
        self._tell(lambda sink: sink.on_metric(metric))

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
            self._pass(call)
            while self._metrics:
                metric = self._metrics.pop(0)
                self._pass(lambda sink: sink.on_metric(metric))  # noqa: B023 - called before the next one
            self._ended = ends

    def _pass(self, call: Callable[[MetricsSink], None]) -> None:
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
