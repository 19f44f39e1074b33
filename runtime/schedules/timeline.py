"""What a simulation found: when each action ran, how full the edges were, and where stages had no work."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from unlocked.runtime.schedules.schedule import Schedule
from unlocked.workers.actions import Action, ActionKind

__all__ = ["Bubble", "Edge", "Span", "Timeline", "format_timeline"]

# They only hand on what the others work on.
_NO_WORK: Final = frozenset({ActionKind.RECV, ActionKind.SEND, ActionKind.RECVB, ActionKind.SENDB})


class Span(NamedTuple):
    """One action in time."""

    stage: int
    action: Action
    start: float
    end: float


class Bubble(NamedTuple):
    """The time in which a stage has no work: before its first F, E, U or SNAP, between actions, after its last one."""

    warm_up: float
    steady: float
    drain: float

    @property
    def total(self) -> float:
        return self.warm_up + self.steady + self.drain


@dataclass(slots=True)
class Edge:
    """An edge and its history. The k-th entries of the lists belong to the k-th micro-batch that was sent.

    Attributes:
        source, target: the stages.
        seconds: time of one transfer.
        depth: slots of the receiver.
        order: the micro-batches, as they were sent.
        sent: when SEND was done, so that the micro-batch lay in the output slot.
        started: when its transfer began, which takes a slot of the receiver.
        delivered: when its transfer ended, which frees the output slot.
        released: when the receiver freed a slot, in that order.
        received: how many the receiver has taken.
    """

    source: int
    target: int
    seconds: float
    depth: int
    order: list[int] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    started: list[float] = field(default_factory=list)
    delivered: list[float] = field(default_factory=list)
    released: list[float] = field(default_factory=list)
    received: int = 0

    def deliver(self) -> None:
        """Work out all transfers whose beginning is known: the micro-batch is there, and so is a slot for it."""
        for k in range(len(self.delivered), min(len(self.sent), len(self.released) + self.depth)):
            start = self.sent[k]  # the output slot was free by then, so the transfer before has ended
            if k >= self.depth:
                start = max(start, self.released[k - self.depth])
            self.started.append(start)
            self.delivered.append(start + self.seconds)

    @property
    def max_in_flight(self) -> int:
        """The largest number of the receiver's slots taken at once."""
        most = freed = 0
        for k, start in enumerate(self.started):
            while freed < len(self.released) and self.released[freed] <= start:
                freed += 1
            most = max(most, k + 1 - freed)
        return most


@dataclass(frozen=True)
class Timeline:
    """Start and end of every action of a schedule.

    Attributes:
        schedule: what was executed.
        queue_depth: receiving slots of every edge.
        starts, ends: for each stage, the times of its actions in their order. The time in which an action waits for
            a micro-batch or a slot lies before its start.
        edges: the edges with their histories.
    """

    schedule: Schedule
    queue_depth: int
    starts: Sequence[Sequence[float]]
    ends: Sequence[Sequence[float]]
    edges: Sequence[Edge]

    @property
    def spans(self) -> list[Span]:
        """All actions in time, in order of their start; at equal starts in stage order."""
        spans = [
            Span(stage, action, start, end)
            for stage, (starts, ends) in enumerate(zip(self.starts, self.ends, strict=True))
            for action, start, end in zip(self.schedule[stage], starts, ends, strict=True)
        ]
        return sorted(spans, key=lambda span: span.start)  # stable: a stage's own order stays

    @property
    def makespan(self) -> float:
        """Time from the start to the end of the last action."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0)

    @property
    def busy_seconds(self) -> list[float]:
        """For each stage, the time in which it executes actions."""
        pairs = zip(self.starts, self.ends, strict=True)
        return [math.fsum(end - start for start, end in zip(starts, ends, strict=True)) for starts, ends in pairs]

    @property
    def busy_fraction(self) -> list[float]:
        """For each stage, its busy share of the makespan; 0 where nothing takes any time."""
        makespan = self.makespan
        return [busy / makespan if makespan else 0.0 for busy in self.busy_seconds]

    @property
    def bubbles(self) -> list[Bubble]:
        """For each stage, its time without work."""
        return [self._bubble(stage) for stage in range(self.schedule.num_stages)]

    @property
    def max_in_flight(self) -> Mapping[tuple[int, int], int]:
        """(source, target) -> the largest number of the edge's receiving slots taken at once; never above the depth."""
        return {(edge.source, edge.target): edge.max_in_flight for edge in self.edges}

    @property
    def throughput(self) -> float:
        """Micro-batches per second in the steady state: the rate at which the last stage finishes them.

        Counted from the end of the first to the end of the last one, so without warm-up and drain. With a single
        micro-batch there is no rate but 1 / makespan.
        """
        last = self.schedule.num_stages - 1
        finished = {
            action.microbatch: end
            for action, end in zip(self.schedule[last], self.ends[last], strict=True)
            if action.kind is not ActionKind.SNAP
        }
        if not finished:
            return 0.0
        times = sorted(finished.values())
        count, seconds = (len(times) - 1, times[-1] - times[0]) if len(times) > 1 else (1, self.makespan)
        return count / seconds if seconds else math.inf

    def _bubble(self, stage: int) -> Bubble:
        starts, ends, actions = self.starts[stage], self.ends[stage], self.schedule[stage]
        if not ends:
            return Bubble(self.makespan, 0.0, 0.0)
        first = next((step for step, action in enumerate(actions) if action.kind not in _NO_WORK), 0)
        gaps = [start - end for start, end in zip(starts, [0.0, *ends], strict=False)]
        return Bubble(math.fsum(gaps[: first + 1]), math.fsum(gaps[first + 1 :]), self.makespan - ends[-1])


def format_timeline(timeline: Timeline, width: int = 100) -> str:
    """The timeline as text, one line per stage and `width` characters of time.

    An action fills the characters from its start to its end, beginning with its kind and micro-batch as far as they
    fit (`F3-----`); dots are bubbles. Actions shorter than a character may not show.
    """
    if width < 1:
        raise ValueError(f"width={width} is not valid. Give at least 1 character.")
    makespan = timeline.makespan
    scale = width / makespan if makespan else 0.0
    label = max((len(f"stage {stage}") for stage in range(timeline.schedule.num_stages)), default=0)
    lines = []
    for stage in range(timeline.schedule.num_stages):
        cells = ["."] * width
        times = zip(timeline.schedule[stage], timeline.starts[stage], timeline.ends[stage], strict=True)
        for action, start, end in times:
            first, stop = round(start * scale), round(end * scale)
            text = f"{action.kind.value}{action.microbatch}"
            cells[first:stop] = text[: stop - first].ljust(stop - first, "-")
        lines.append(f"{f'stage {stage}'.ljust(label)} |{''.join(cells)}|")
    return "\n".join(lines)
