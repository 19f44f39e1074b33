"""When actions begin and end: by the host's clock on a CPU, by events on the stages' streams on a GPU."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from unlocked.workers.actions import Action, ActionKind
from unlocked.workers.stopwatch import Recorder

__all__ = ["DeviceClock", "DeviceMark", "EventMarks", "HostMarks", "Mark"]

Mark = Callable[[int, str, int], None]
"""mark(stage, what, position): now begins action `what` ("F", "U", "E", "SNAP") of a micro-batch, or it has its
"end". One action's begin is the end of the stage's action before it."""


class HostMarks:
    """For stages on a CPU, where an action is done when the call returns."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self._recorders = recorders
        self._open: list[tuple[str, int, float] | None] = [None] * len(recorders)

    def __call__(self, stage: int, what: str, position: int) -> None:
        now = time.perf_counter()
        if (begun := self._open[stage]) is not None:
            kind, at, start = begun
            self._recorders[stage].add(Action(stage, ActionKind(kind), at), start, now)
        self._open[stage] = None if what == "end" else (what, position, now)


class DeviceMark(NamedTuple):
    """An event that was recorded as an action began or ended."""

    stage: int
    what: str
    position: int
    event: torch.cuda.Event


class DeviceClock:
    """Makes spans and busy shares of marks, in windows: marks of all stages from one stretch of time.

    Args:
        recorders: of the stages; they get the spans, and a busy time that is the windows' share of the time so far.
        whole: the windows cover the whole run; else they are samples of it.
    """

    def __init__(self, recorders: Sequence[Recorder], *, whole: bool) -> None:
        self._recorders, self._whole = recorders, whole
        self._busy = [0.0] * len(recorders)
        self._wall = 0.0
        # Where the device's time and the machine's meet.
        self._base = torch.cuda.Event(enable_timing=True)
        self._base.record()
        self._base.synchronize()
        self._base_us = time.time() * 1e6

    def add(self, marks: Sequence[DeviceMark], offset: int = 0) -> None:
        """Adds a window whose events have all happened. `offset` is added to the positions."""
        if not marks:
            return
        # Times are 32-bit milliseconds: counted from the window's own first event, they keep their microseconds.
        origin = marks[0].event
        begin = self._base_us + 1e3 * self._base.elapsed_time(origin)
        times = [1e3 * origin.elapsed_time(mark.event) for mark in marks]
        self._wall += max(times) - min(times)
        for stage, recorder in enumerate(self._recorders):
            mine = [(mark, t) for mark, t in zip(marks, times, strict=True) if mark.stage == stage]
            for (mark, start), (_, end) in pairwise(mine):
                if mark.what != "end":
                    self._busy[stage] += end - start
                    action = Action(stage, ActionKind(mark.what), mark.position + offset)
                    recorder.add_span(action, begin + start, begin + end)
            recorder.estimate_busy(self._busy[stage] / max(self._wall, 1e-3))

    def busy_fraction(self, seconds: float) -> list[float]:
        """Each stage's share of `seconds`, the run's length, or of the sampled windows."""
        wall = 1e6 * seconds if self._whole else self._wall
        return [busy / max(wall, 1e-3) for busy in self._busy]


class EventMarks:
    """For actions that are issued one by one: an event on the stage's stream at every mark, read when it has happened.

    Args:
        streams: of the stages.
        clock: what the windows are for.
    """

    def __init__(self, streams: Sequence[torch.cuda.Stream], clock: DeviceClock) -> None:
        self._streams, self._clock = streams, clock
        self._open: list[DeviceMark] = []
        self._closed: deque[list[DeviceMark]] = deque()

    def __call__(self, stage: int, what: str, position: int) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._streams[stage])
        self._open.append(DeviceMark(stage, what, position, event))

    def cut(self) -> None:
        """The window ends here."""
        if self._open:
            self._closed.append(self._open)
            self._open = []

    def collect(self, *, wait: bool = False) -> None:
        """Hands the windows that have happened to the clock; with `wait`, all."""
        while self._closed:
            last = {mark.stage: mark.event for mark in self._closed[0]}
            if wait:
                for event in last.values():
                    event.synchronize()
            elif not all(event.query() for event in last.values()):
                return
            self._clock.add(self._closed.popleft())
