"""The cost model of a pipeline of equal stages, fitted to measurements, and what the simulator makes of it."""

import gc
import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from unlocked.runtime.schedules.backpropagation import SCHEDULES, backpropagation_schedule, steps_per_second
from unlocked.runtime.schedules.schedule import build_schedule
from unlocked.runtime.schedules.simulate import Costs, simulate
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.schedules.timeline import Timeline
from unlocked.workers.actions import ActionKind

__all__ = ["LOCAL", "CostModel", "Line", "Prediction", "predict", "stage_factors"]

LOCAL: Final = "LLS"
_STREAM = 64  # micro-batches of a simulated local stream: the steady state lasts as long as there are any


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The line through measured points that makes the sum of squared relative residuals smallest.

    Attributes:
        intercept, slope: of the line.
        largest_residual: the largest distance of a point from the line, as a share of the point.
    """

    intercept: float
    slope: float
    largest_residual: float

    @classmethod
    def fit(cls, xs: Sequence[float], ys: Sequence[float]) -> "Line":
        """Raises: ValueError with fewer than two different abscissas."""
        if len(set(xs)) < 2:
            raise ValueError(f"a line needs at least two different points, got x = {list(xs)}")
        points = list(zip(xs, ys, strict=True))
        weights = [1 / y**2 for y in ys]
        mean_x, mean_y = (statistics.fmean(values, weights) for values in (xs, ys))
        covariance = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
        variance = sum(w * (x - mean_x) ** 2 for w, x in zip(weights, xs, strict=True))
        slope = covariance / variance
        intercept = mean_y - slope * mean_x
        residuals = [abs(y - intercept - slope * x) / y for x, y in points]
        return cls(intercept=intercept, slope=slope, largest_residual=max(residuals))

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds per micro-batch on one core, and per hop."""

    step: Line
    """A local training step of a chain against its blocks: the slope is a block's, the intercept loading and output."""
    forward_share: float
    """Of a block's local step; the rest is its update."""
    output: float
    """The output layer's share of the intercept, in seconds."""
    hop: Line
    """A micro-batch from one process to the next, against its bytes."""
    backpropagation: dict[str, float]
    """Of a block: forward (F), input gradient (B), weight gradient (W); and the optimizer (U), once a step."""

    def local(self, num_stages: int, blocks: int, link: "Link", speed: float, factors: Sequence[float]) -> Costs:
        """Costs of the local schedule. Only the last layer's update of a stage waits for SEND."""
        block = self.step.slope / speed
        forward, update = block * self.forward_share, block * (1 - self.forward_share)
        rows = [
            {ActionKind.F: blocks * forward + (blocks - 1) * update, ActionKind.U: update} for _ in range(num_stages)
        ]
        self._add_ends(rows, speed)
        return link.costs(_scaled(rows, factors), (ActionKind.SEND,))

    def whole(self, num_stages: int, blocks: int, link: "Link", speed: float, factors: Sequence[float]) -> Costs:
        """Costs of backpropagation's schedules."""
        row = {ActionKind(kind): blocks * seconds / speed for kind, seconds in self.backpropagation.items()}
        rows = [dict(row) for _ in range(num_stages)]
        self._add_ends(rows, speed)
        return link.costs(_scaled(rows, factors), (ActionKind.SEND, ActionKind.SENDB))

    def _add_ends(self, rows: list[dict[ActionKind, float]], speed: float) -> None:
        """Loading on the first stage, the output layer on the last, the same for every schedule."""
        rows[0][ActionKind.F] += max(self.step.intercept - self.output, 0.0) / speed
        rows[-1][ActionKind.F] += self.output / speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Between stages. Copying occupies the sender (shared memory); a given link carries while the stages work."""

    seconds: float
    occupies_sender: bool

    def costs(self, rows: list[dict[ActionKind, float]], sends: Sequence[ActionKind]) -> Costs:
        if self.occupies_sender:
            for row in rows:
                row.update(dict.fromkeys(sends, self.seconds))
        return Costs(rows, [0.0 if self.occupies_sender else self.seconds] * (len(rows) - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One schedule on so many equal stages."""

    schedule: str
    stages: int
    microbatches: int
    """Of a step of backpropagation; 1 for local learning, which updates after each."""
    spread: float
    """Of the stages' speeds: standard deviation of the logarithm."""
    microbatches_per_second: float
    efficiency: float
    """Share of the steady state in which the slowest stage works."""
    fill_seconds: float
    """Until the last stage has work: once a run for local learning, once a step for backpropagation."""
    drain_seconds: float
    """From the first stage that is out of work to the end; as often."""


def predict(
    model: CostModel,
    schedule: str,
    num_stages: int,
    *,
    blocks: int,
    link: Link,
    microbatches: int = 32,
    speed: float = 1.0,
    spread: float = 0.0,
    queue_depth: int = 4,
    seed: int = 0,
) -> Prediction:
    """Simulates `num_stages` stages of `blocks` equal blocks each.

    Args:
        schedule: LOCAL, or one of backpropagation's.
        link: a hop.
        microbatches: of one step of backpropagation.
        speed: of every stage's compute, 1 being this machine's core.
        spread: see `stage_factors`.
    """
    factors = stage_factors(num_stages, spread, seed)
    local = schedule == LOCAL
    if not local and schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is not known; valid: {LOCAL}, {', '.join(SCHEDULES)}")
    costs = (model.local if local else model.whole)(num_stages, blocks, link, speed, factors)
    with _no_collection():  # millions of small objects that live until the end
        if local:
            plan = StreamPlan(epochs=1, train_size=_STREAM, batch_size=1)
            timeline = simulate(build_schedule(num_stages, plan), costs, queue_depth)
            rate = timeline.throughput
        else:
            timeline = simulate(backpropagation_schedule(schedule, num_stages, microbatches, 2), costs, microbatches)
            rate = microbatches * steps_per_second(timeline)
        fill, drain = _fill_and_drain(timeline, local)
    return Prediction(
        schedule=schedule,
        stages=num_stages,
        microbatches=1 if local else microbatches,
        spread=spread,
        microbatches_per_second=rate,
        efficiency=rate * max(_work(row, 1 if local else microbatches) for row in costs.actions),
        fill_seconds=fill,
        drain_seconds=drain,
    )


def stage_factors(num_stages: int, spread: float, seed: int = 0) -> list[float]:
    """Each stage's factor on its times: log-normal with median 1; the first S of a longer pipeline are those of S."""
    if spread < 0:
        raise ValueError(f"spread={spread} is not valid. Give 0 (equal stages) or more.")
    draw = random.Random(seed)
    return [draw.lognormvariate(0.0, spread) if spread else 1.0 for _ in range(num_stages)]


def _work(row: object, microbatches: int) -> float:
    """A stage's own seconds per micro-batch; the optimizer step of backpropagation is shared by its micro-batches."""
    assert isinstance(row, dict)
    update = row.get(ActionKind.U, 0.0)
    return float(sum(row.values()) - update + update / microbatches)


def _fill_and_drain(timeline: Timeline, local: bool) -> tuple[float, float]:
    """Of the whole stream, or of the first step."""
    stop = [_end_of_first(timeline, stage, local) for stage in range(timeline.schedule.num_stages)]
    last = timeline.schedule.num_stages - 1
    first_work = next(
        start
        for action, start in zip(timeline.schedule[last], timeline.starts[last], strict=True)
        if action.kind is ActionKind.F
    )
    return first_work, max(stop) - min(stop)


def _end_of_first(timeline: Timeline, stage: int, local: bool) -> float:
    if local:
        return timeline.ends[stage][-1]
    actions = zip(timeline.schedule[stage], timeline.ends[stage], strict=True)
    return next(end for action, end in actions if action.kind is ActionKind.U)


def _scaled(rows: list[dict[ActionKind, float]], factors: Sequence[float]) -> list[dict[ActionKind, float]]:
    return [{kind: cost * factor for kind, cost in row.items()} for row, factor in zip(rows, factors, strict=True)]


@contextmanager
def _no_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
