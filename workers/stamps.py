"""When actions begin and end on a GPU: by events on the stages' streams. On a CPU the loop times them itself."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from unlocked.workers.actions import Action, ActionKind
from unlocked.workers.stopwatch import Stopwatch

__all__ = ["DeviceClock", "DeviceStamp", "EventStamps", "Stamp"]

Stamp = Callable[[int, str, int], None]
"""stamp(stage, what, position): now begins action `what` ("F", "U", "E", "SNAP") of a micro-batch, or it has its
"end". One action's begin is the end of the stage's action before it."""


class DeviceStamp(NamedTuple):
    """An event that was recorded as an action began or ended."""

    stage: int
    what: str
    position: int
    event: torch.cuda.Event


class DeviceClock:
    """Makes timed actions and busy shares of stamps, in windows: stamps of all stages from one stretch of time.

    Args:
        stopwatches: of the stages; they get the actions, and a busy time that is the windows' share of the time so far.
        whole: the windows cover the whole run; else they are samples of it.
    """

    def __init__(self, stopwatches: Sequence[Stopwatch], *, whole: bool) -> None:
        self._stopwatches, self._whole = stopwatches, whole
        self._busy = [0.0] * len(stopwatches)
        self._wall = 0.0
        # Where the device's time and the machine's meet.
        self._base = torch.cuda.Event(enable_timing=True)
        self._base.record()
        self._base.synchronize()
        self._base_us = time.time() * 1e6

    def add(self, stamps: Sequence[DeviceStamp], offset: int = 0) -> None:
        """Adds a window whose events have all happened. `offset` is added to the positions."""
        if not stamps:
            return
        # Times are 32-bit milliseconds: counted from the window's own first event, they keep their microseconds.
        origin = stamps[0].event
        begin = self._base_us + 1e3 * self._base.elapsed_time(origin)
        times = [1e3 * origin.elapsed_time(stamp.event) for stamp in stamps]
        self._wall += max(times) - min(times)
        under_way: dict[int, tuple[DeviceStamp, float]] = {}  # stage -> what began last, and when
        for stamp, end in zip(stamps, times, strict=True):
            begun = under_way.get(stamp.stage)
            if begun is not None:
                (stage, what, position, _), start = begun
                self._busy[stage] += end - start
                if self._stopwatches[stage].keep:
                    action = Action(stage, ActionKind(what), position + offset)
                    self._stopwatches[stage].add_timed(action, begin + start, begin + end)
            if stamp.what == "end":
                under_way.pop(stamp.stage, None)
            else:
                under_way[stamp.stage] = (stamp, end)
        for stopwatch, busy in zip(self._stopwatches, self._busy, strict=True):
            stopwatch.estimate_busy(busy / max(self._wall, 1e-3))

    def busy_fraction(self, seconds: float) -> list[float]:
        """Each stage's share of `seconds`, the run's length, or of the sampled windows."""
        wall = 1e6 * seconds if self._whole else self._wall
        return [busy / max(wall, 1e-3) for busy in self._busy]


class EventStamps:
    """For actions that are issued one by one: an event on the stage's stream at every stamp, read when it has happened.

    Args:
        streams: of the stages.
        clock: what the windows are for.
    """

    def __init__(self, streams: Sequence[torch.cuda.Stream], clock: DeviceClock) -> None:
        self._streams, self._clock = streams, clock
        self._open: list[DeviceStamp] = []
        self._closed: deque[list[DeviceStamp]] = deque()

    def __call__(self, stage: int, what: str, position: int) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._streams[stage])
        self._open.append(DeviceStamp(stage, what, position, event))

    def cut(self) -> None:
        """The window ends here."""
        if self._open:
            self._closed.append(self._open)
            self._open = []

    def collect(self) -> None:
        """Hands the windows that have happened to the clock."""
        while self._closed:
            last = {stamp.stage: stamp.event for stamp in self._closed[0]}
            if not all(event.query() for event in last.values()):
                return
            self._clock.add(self._closed.popleft())
