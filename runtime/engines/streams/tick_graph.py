"""What the streams engine captures before it runs: every kind of micro-batch of each stage, and graphs of many ticks.

A tick graph takes every stage through many full micro-batches of one kind, with the data flow's dependences and no
others: on a GPU one CUDA graph, in which the stages run side by side.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlocked.runtime.job import Job
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import Item, ItemKind
from unlocked.workers.captured import Captured, no_collection
from unlocked.workers.lane import Lane
from unlocked.workers.source import BatchSource
from unlocked.workers.stamps import DeviceClock, DeviceStamp

__all__ = ["TickGraph", "capture"]

_WARM_UPS = 3  # of every kind of micro-batch before a capture, as torch's own capturing helpers make
_SAMPLE = 32  # of so many launches one is timed, where not all are
# An epoch has fewer micro-batches of the other kinds: their graphs have a part of the ticks, so that most fit in.
_TAIL_SHARE = 4


def capture(
    job: Job, lanes: Sequence[Lane], *, queue_depth: int, graph_ticks: int, timed: bool
) -> "Mapping[ItemKind, TickGraph]":
    """Warms up, captures every kind of item that the stream has, and puts all state back as it was.

    Args:
        queue_depth, graph_ticks: the engine's.
        timed: every launch is to be timed, for a trace; else a sample.

    Returns:
        The tick graphs: none of a kind of which an epoch has too few for one, nor where the data is not where captured
        work can read it.
    """
    items = (item for item in job.plan.items(job.start) if item.kind != "snapshot")
    some = islice(items, 2 * (len(job.plan) // job.plan.num_epochs + 1))
    shapes = list(dict.fromkeys((item.kind, item.size) for item in some))
    source = lanes[0].stage.source
    runs: list[_Run] = []
    if isinstance(source, BatchSource):
        runs = _runs(job.plan, len(lanes), queue_depth, graph_ticks)
        source.reserve(max([run.ticks for run in runs], default=1))
    on_device = lanes[0].stream is not None
    with _Restored(lanes), no_collection() if on_device else nullcontext():
        _warm_up(lanes, shapes)
        for lane in lanes:
            with lane.on_stream():
                for kind, size in shapes:
                    lane.capture(kind, size)
        place = Place(job.device, lanes)
        graphs = {run.kind: TickGraph(lanes, run, place, timed=timed) for run in runs}
        if on_device:
            for lane in lanes:
                with lane.on_stream():
                    lane.try_captured()
                _synchronize([lane])  # stages share slots, and nothing orders these launches
            for graph in graphs.values():
                graph.try_captured()
    for lane in lanes:
        lane.launches = True
    return graphs


class _Run(NamedTuple):
    """What a tick graph takes every stage through."""

    kind: ItemKind
    rows: int
    """Of every micro-batch."""
    ticks: int
    alignment: int
    """The ticks at which a launch may begin are its multiples; there the rings' slots are those captured."""


class Place:
    """Where tick graphs are captured and launched: one after the other, so that they share their memory.

    Between two tick graphs that follow each other the lanes have nothing to do: they are waited for at the first, and
    wait for the last.
    """

    def __init__(self, device: torch.device, lanes: Sequence[Lane]) -> None:
        self._lanes = list(lanes)
        self._entered = False
        self.stream: torch.cuda.Stream | None = None
        """None on a CPU."""
        self.pool: Any = None
        if device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def enter(self) -> None:
        """What is issued to the place's stream from now on comes after all that the lanes have."""
        if self.stream is None or self._entered:
            return
        for lane in self._lanes:
            assert lane.stream is not None
            self.stream.wait_stream(lane.stream)
            lane.entry.forget_events()
        self._entered = True

    def leave(self) -> None:
        """What the lanes get next comes after all that was issued to the place's stream."""
        if self.stream is None or not self._entered:
            return
        for lane in self._lanes:
            assert lane.stream is not None
            lane.stream.wait_stream(self.stream)
        self._entered = False

    def on_stream(self) -> AbstractContextManager[None]:
        """Everything inside is issued to the place's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class TickGraph:
    """Captured work of many full micro-batches of every stage.

    Before a launch the micro-batches of the tick before it lie in the rings, so every stage has work from the first
    tick on. On a GPU a second copy of the training graph also records the time of every action, and is launched now and
    then; for a trace there are two such copies of every graph and no other, so that one is read while the other runs.
    """

    def __init__(self, lanes: Sequence[Lane], run: _Run, place: Place, *, timed: bool) -> None:
        self.kind, self.rows, self.ticks, self.alignment = run
        self._lanes = list(lanes)
        self._launches = 0
        self.clock: DeviceClock | None = None
        """Gets the times of timed launches, on a GPU."""
        self.place, self.stream = place, place.stream
        self._set_mode()
        copies = 0 if self.stream is None else 2 if timed else self.kind == "train"
        self._timed = [_TimedCopy(self, place.pool) for _ in range(copies)]
        self._plain = None if timed and self._timed else self._capture(place.pool)

    def launch(self, first: Item) -> None:
        """Runs the ticks whose stage 0 begins at `first`. Ordered after all lanes; they come after it by
        `place.leave`."""
        source = self._lanes[0].stage.source
        assert isinstance(source, BatchSource)
        if self.stream is None:
            assert self._plain is not None
            source.seek(first, self.ticks)
            with self._lanes_over_many_ticks(first.position):
                self._plain.launch()
        else:
            self._launch_on_device(source, first)
        if self.kind == "train":
            for lane in self._lanes:
                lane.advance(self.ticks)

    def collect(self) -> None:
        """Hands the times of timed launches that have happened to the clock."""
        assert self.clock is not None
        for copy in self._timed:
            copy.collect(self.clock)

    def try_captured(self) -> None:
        """Launches each copy once; see `Lane.try_captured`."""
        self._set_mode()
        self.place.enter()
        with self.place.on_stream():
            for captured in [*([self._plain] if self._plain else []), *(copy.captured for copy in self._timed)]:
                captured.launch()
        self.place.leave()

    def _launch_on_device(self, source: BatchSource, first: Item) -> None:
        captured, copy = self._plain, None
        if captured is None or (self._timed and self._launches % _SAMPLE == 1):
            copy = self._timed[self._launches % len(self._timed)]
            captured = copy.captured
            assert self.clock is not None
            copy.collect(self.clock, wait=True)  # before its events are recorded anew
        self._launches += 1
        self.place.enter()
        with self.place.on_stream():
            source.seek(first, self.ticks)
            captured.launch()
            if copy is not None:
                copy.started(first.position)

    def _capture(self, pool: Any) -> Captured:
        """One copy. What is captured waits for nothing outside, and nothing outside for what is in it."""
        for lane in self._lanes:
            lane.entry.forget_events()  # a capture begins by waiting for the device
        with self._uncounted(), self._lanes_over_many_ticks(None):
            captured = Captured(self._work, self.stream, pool)
        for lane in self._lanes:
            lane.entry.forget_events()
        return captured

    def _work(self) -> None:
        """Issues all ticks. Later stages first, as the engine does."""
        if self.stream is not None:  # fork
            begin = torch.cuda.Event()
            begin.record(self.stream)
            for lane in self._lanes:
                assert lane.stream is not None
                lane.stream.wait_event(begin)
        with self._uncounted():
            for tick in range(self.ticks):
                for lane in reversed(self._lanes):
                    k = lane.stage.index
                    # Stage k is k micro-batches behind: its slot is that of the position tick - k.
                    item = Item(tick - k, self.kind, 0, 0, self.rows, False)
                    with lane.on_stream():
                        lane.work(item, stage_actions(k, len(self._lanes), [item]))
        if self.stream is not None:  # join
            for lane in self._lanes:
                assert lane.stream is not None
                self.stream.wait_stream(lane.stream)

    def _set_mode(self) -> None:
        for lane in self._lanes:
            with lane.on_stream():
                for layer in lane.stage.layers:
                    layer.set_mode(self.kind)

    def _uncounted(self) -> ExitStack:
        stack = ExitStack()
        for lane in self._lanes:
            stack.enter_context(lane.uncounted())
        return stack

    @contextmanager
    def _lanes_over_many_ticks(self, offset: int | None) -> Iterator[None]:
        """Inside, stage 0 reads on from where the cursor stands, and actions are not launched from other captures.

        Args:
            offset: where in the stream the ticks are, where the work is called again and may fail.
        """
        for lane in self._lanes:
            lane.launches, lane.cursor_stays, lane.offset = False, True, offset
        try:
            yield
        finally:
            for lane in self._lanes:
                lane.launches, lane.cursor_stays, lane.offset = True, False, None


class _TimedCopy:
    """The ticks' work with an event at every stamp."""

    def __init__(self, graph: TickGraph, pool: Any) -> None:
        self._stamps: list[DeviceStamp] = []
        self._streams = [lane.stream for lane in graph._lanes]
        self._running: tuple[int, torch.cuda.Event] | None = None
        for lane in graph._lanes:
            lane.stamp = self._stamp
        try:
            self.captured = graph._capture(pool)
        finally:
            for lane in graph._lanes:
                lane.stamp = None

    def started(self, position: int) -> None:
        """It was launched for the ticks at `position`, on the current stream."""
        done = torch.cuda.Event()
        done.record()
        self._running = (position, done)

    def collect(self, clock: DeviceClock, *, wait: bool = False) -> None:
        if self._running is None:
            return
        position, done = self._running
        if wait:
            done.synchronize()
        elif not done.query():
            return
        self._running = None
        clock.add(self._stamps, position)

    def _stamp(self, stage: int, what: str, position: int) -> None:
        # External: the graph records the event anew at every launch, instead of drawing a dependence from it.
        event = torch.cuda.Event(enable_timing=True, external=True)
        event.record(self._streams[stage])
        self._stamps.append(DeviceStamp(stage, what, position, event))


class _Restored:
    """Puts the layers back, in place, as they were before a warm-up: captured addresses stay."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes

    def __enter__(self) -> None:
        self._layers = [layer for lane in self._lanes for layer in lane.stage.layers]
        self._saved = [
            (_clone(layer.state_dict()), layer.eval_totals.clone(), layer.score_totals.clone())
            for layer in self._layers
        ]
        _synchronize(self._lanes)

    def __exit__(self, kind: object, *_: object) -> None:
        # After a failure the device may be in no state to be restored; then that failure is the news.
        with suppress(RuntimeError) if kind is not None else nullcontext():
            _synchronize(self._lanes)
            for layer, (state, eval_totals, score_totals) in zip(self._layers, self._saved, strict=True):
                layer.load_state_dict(state)
                layer.eval_totals.copy_(eval_totals)
                layer.score_totals.copy_(score_totals)


def _runs(plan: StreamPlan, stages: int, queue_depth: int, graph_ticks: int) -> list[_Run]:
    """Of every kind of which an epoch has enough full micro-batches."""
    depth = queue_depth if stages > 1 else 1
    ticks = -(-graph_ticks // depth) * depth
    tail = -(-ticks // _TAIL_SHARE // depth) * depth
    full = plan.train_size // plan.batch_size
    found: list[tuple[ItemKind, int, int, int]] = [("train", plan.batch_size, ticks, full)]
    if plan.eval_size:
        rows = min(plan.eval_batch_size, plan.eval_size)
        found.append(("statistics", plan.batch_size, tail, min(full, plan.statistics_per_epoch)))
        found.append(("evaluate", rows, tail, plan.eval_size // rows))
    return [_Run(kind, rows, ticks, depth) for kind, rows, ticks, count in found if ticks and count >= ticks + stages]


def _warm_up(lanes: Sequence[Lane], shapes: Sequence[tuple[ItemKind, int]]) -> None:
    repeats = 1 if lanes[0].stream is None else _WARM_UPS
    for kind, size in shapes:
        for _ in range(repeats):
            for lane in lanes:
                item = Item(0, kind, 0, 0, size, False)
                with lane.on_stream():
                    lane.warm_up(item, list(stage_actions(lane.stage.index, len(lanes), [item])))


def _synchronize(lanes: Sequence[Lane]) -> None:
    if any(lane.stream is not None for lane in lanes):
        torch.cuda.synchronize()


def _clone(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _clone(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_clone(value) for value in state]
    return state
