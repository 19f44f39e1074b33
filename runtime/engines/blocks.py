"""One captured CUDA graph over several ticks of all stages, with the data flow's edges and no others."""

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from unlocked.runtime.job import Job
from unlocked.workers.actions import Action, ActionKind, Item
from unlocked.workers.lane import Lane
from unlocked.workers.source import BatchSource
from unlocked.workers.trace import Span

__all__ = ["BlockGraph"]

_WARM_UP_TICKS = 3


class BlockGraph:
    """A graph that takes every stage through `ticks` full training micro-batches.

    Before a replay the micro-batches of the tick before it lie in the rings (or were computed by an earlier replay), so
    every stage has work from the first tick on. Two copies are captured; one of them also records the time of every
    action, and is replayed now and then (or always, for a trace).
    """

    def __init__(self, lanes: Sequence[Lane], ticks: int, alignment: int, traced: bool) -> None:
        self.ticks, self.alignment = ticks, alignment
        self.stream = torch.cuda.Stream(lanes[0].stage.layers[0].device)
        self.spans: list[list[Span]] = [[] for _ in lanes]
        self._lanes, self._always = list(lanes), traced
        self._graph = torch.cuda.CUDAGraph()
        self._timed = torch.cuda.CUDAGraph()
        self._marks: list[tuple[int, str, int, torch.cuda.Event]] = []
        self._begin: torch.cuda.Event | None = None
        self._replays = 0
        self._busy = [0.0] * len(lanes)
        self._wall = 0.0
        self._clock_us = 0.0

    @classmethod
    def capture(cls, job: Job, lanes: Sequence[Lane], ticks: int) -> "BlockGraph | None":
        """Warms up, captures, and puts every state back. None if the run is too short for a block, or if its data is
        not on the device, where a graph could read it."""
        source = lanes[0].stage.source
        if not isinstance(source, BatchSource):
            return None
        depth = job.settings.queue_depth if len(lanes) > 1 else 1
        ticks = -(-ticks // depth) * depth
        plan = job.plan
        if plan.train_size // plan.batch_size < ticks + len(lanes):
            return None
        source.reserve(ticks)
        block = cls(lanes, ticks, depth, job.settings.trace is not None)
        item = Item(0, "train", 0, 0, plan.batch_size, False)
        with _Restored(lanes):
            for _ in range(_WARM_UP_TICKS):
                for lane in lanes:
                    with lane.on_stream():
                        source.seek(item)
                        lane.compute(item, lambda _: None)
                    torch.cuda.synchronize()
            block._capture(block._graph, item, None)
            block._capture(block._timed, item, block._mark)
        return block

    def replay(self, first: Item) -> None:
        """Runs the block whose stage 0 begins at `first`. Ordered after all lanes, and they after it."""
        source = self._lanes[0].stage.source
        assert isinstance(source, BatchSource)
        for lane in self._lanes:
            assert lane.stream is not None
            self.stream.wait_stream(lane.stream)
        timed = self._always or self._replays % 16 == 1
        with torch.cuda.stream(self.stream):
            source.seek(first, self.ticks)
            (self._timed if timed else self._graph).replay()
        for lane in self._lanes:
            assert lane.stream is not None
            lane.stream.wait_stream(self.stream)
            lane.inbox.forget_events()
        self._replays += 1
        if timed:
            self._read_times(first)

    def busy_fraction(self) -> list[float]:
        """Per stage, the share of the sampled blocks' time in which it had an action under way."""
        return [busy / max(self._wall, 1e-12) for busy in self._busy]

    def _capture(self, graph: torch.cuda.CUDAGraph, item: Item, mark: object) -> None:
        lanes = self._lanes
        for lane in lanes:
            lane.inbox.forget_events()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            begin = torch.cuda.Event()
            begin.record(self.stream)
            for lane in lanes:
                assert lane.stream is not None
                lane.stream.wait_event(begin)
            for tick in range(self.ticks):
                for k in reversed(range(len(lanes))):
                    lane = lanes[k]
                    # Stage k is k micro-batches behind: its slot is that of the position tick - k.
                    here = Item(tick - k, "train", item.epoch, item.index, item.size, False)
                    with lane.uncounted(), lane.on_stream():
                        lane.issue_in_block(here, tick, self._mark if mark is not None else None)
            for lane in lanes:
                assert lane.stream is not None
                self.stream.wait_stream(lane.stream)
        for lane in lanes:
            lane.inbox.forget_events()

    def _mark(self, stage: int, what: str, item: Item) -> None:
        event = torch.cuda.Event(enable_timing=True, external=True)
        event.record(self._lanes[stage].stream)
        self._marks.append((stage, what, item.position, event))

    def _read_times(self, first: Item) -> None:
        """Adds up a timed replay. It waits for the device, which is why few replays are timed."""
        wait = torch.cuda.Event()
        wait.record(self.stream)
        wait.synchronize()
        origin = self._marks[0][3]
        times = [(k, what, at, origin.elapsed_time(event) * 1e3) for k, what, at, event in self._marks]
        low, high = min(t for *_, t in times), max(t for *_, t in times)
        self._wall += high - low
        now = time.time() * 1e6 - (high - low)
        for k in range(len(self._lanes)):
            mine = [(what, at, t) for stage, what, at, t in times if stage == k]
            for (what, at, start), (_, _, end) in pairwise(mine):
                if what == "end":
                    continue
                self._busy[k] += end - start
                if self._always:
                    action = Action(k, ActionKind(what), first.position + at)
                    self.spans[k].append(Span(k, str(action), now + start - low, now + end - low))


class _Restored:
    """Puts layers back, in place, as they were before a warm-up: captured addresses stay."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes

    def __enter__(self) -> None:
        self._layers = [layer for lane in self._lanes for layer in lane.stage.layers]
        self._saved = [_clone(layer.state_dict()) for layer in self._layers]
        torch.cuda.synchronize()

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        for layer, state in zip(self._layers, self._saved, strict=True):
            layer.load_state_dict(state)
        for lane in self._lanes:
            lane.stage.begin_epoch()
        torch.cuda.synchronize()


def _clone(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _clone(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_clone(value) for value in state]
    return state
