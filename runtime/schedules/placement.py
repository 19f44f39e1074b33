"""Where the stages begin: as what each layer takes and what each link between two stages takes allow, both measured.

The numbers of a run never depend on it, its speed does. No torch here, so that what was measured can be simulated on
any machine.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from unlocked.runtime.schedules.partition import partition, stages_from
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import ActionKind

__all__ = ["LayerCost", "Link", "Machine", "Placement", "cut_stages", "fewest_stages"]

_WORTH = 0.02  # share of the best throughput that another process must bring: less is within what measuring varies


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What a training micro-batch costs in one layer.

    Attributes:
        forward, update: seconds.
        output_bytes: of the message that carries its output to another stage, labels and all; 0 of the last layer.
    """

    name: str
    forward: float
    update: float
    output_bytes: int

    @property
    def seconds(self) -> float:
        return self.forward + self.update


@dataclass(frozen=True, slots=True)
class Link:
    """Between the processes of two neighbouring stages.

    Attributes:
        latency: seconds, one way.
        bandwidth: bytes per second.
    """

    latency: float
    bandwidth: float

    def seconds(self, num_bytes: float, *, depth: int, hold: float) -> float:
        """How long the link is taken by each of many micro-batches that follow one another.

        They follow each other as fast as the bytes go, but no more than `depth` can be on their way: the receiver's
        slot is told free by a message back, and free once it has been held for `hold` seconds.
        """
        passing = num_bytes / self.bandwidth
        return max(passing, (2 * self.latency + passing + hold) / depth)


@dataclass(frozen=True, slots=True)
class Machine:
    """How many neighbouring ranks it has, and how many cores for them."""

    processes: int
    cores: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What was measured, and what was chosen.

    Attributes:
        batch_size: rows of the micro-batches that were timed.
        machines: in the order of their ranks, which are neighbours.
        links: between each two neighbouring stages; None: in memory, or not measured. Empty: none was.
        stages: the layers of each stage.
    """

    batch_size: int
    layers: tuple[LayerCost, ...]
    machines: tuple[Machine, ...]
    links: tuple[Link | None, ...]
    stages: tuple[range, ...]

    @property
    def stage_seconds(self) -> list[float]:
        """What a training micro-batch takes each stage, links left out."""
        return [sum(self.layers[i].seconds for i in part) for part in self.stages]

    def pace(self, queue_depth: int, *, rows: float | None = None, trains: bool = True) -> float:
        """Seconds between two micro-batches in the steady state: what the slowest stage, link or machine takes.

        Args:
            queue_depth: micro-batches that a stage may be ahead of the next one.
            rows: of a micro-batch; default: the measured ones.
            trains: False: it is passed forward only.
        """
        scale = 1.0 if rows is None else rows / self.batch_size
        stages = [self._compute(part, scale, trains) for part in self.stages]
        links = self.link_seconds(queue_depth, scale=scale, trains=trains)
        return max([*stages, *links, *self._machine_seconds(stages)])

    def action_seconds(self) -> list[dict[ActionKind, float]]:
        """What each stage's actions take with a training micro-batch; F also updates all its layers but the last."""
        found = []
        for part in self.stages:
            update = self.layers[part.stop - 1].update
            seconds = {ActionKind.F: self._compute(part, 1.0, True) - update, ActionKind.U: update}
            found.append(seconds | {ActionKind.E: self._compute(part, 1.0, False)})
        return found

    def link_seconds(self, queue_depth: int, *, scale: float = 1.0, trains: bool = True) -> list[float]:
        """How long each link is taken by a micro-batch; 0 where there is none."""
        links = self.links or (None,) * (len(self.stages) - 1)
        return [
            0.0
            if link is None
            else link.seconds(
                scale * self.layers[part.start - 1].output_bytes,
                depth=queue_depth,
                hold=self._compute(part, scale, trains),
            )
            for link, part in zip(links, self.stages[1:], strict=True)
        ]

    def filling(self) -> float:
        """Seconds that the first micro-batch is under way, less the slowest stop on it: what a run takes besides the
        pace of its micro-batches."""
        stages = self.stage_seconds
        ways = [
            link.latency + self.layers[part.start - 1].output_bytes / link.bandwidth
            for link, part in zip(self.links, self.stages[1:], strict=False)
            if link is not None
        ]
        return sum(stages) + sum(ways) - max([*stages, *ways])

    def run_seconds(self, plan: StreamPlan, start: int, queue_depth: int) -> float:
        """What is predicted for the stream from position `start` to its end, all evaluations included."""
        steps = plan.train_steps - plan.steps_before(start)
        epochs = plan.num_epochs - (plan[start].epoch if start < len(plan) else plan.num_epochs)
        mean = plan.batch_size if plan.drop_last else plan.train_size / plan.steps_per_epoch
        seconds = self.filling() + steps * self.pace(queue_depth, rows=mean)
        seconds += epochs * plan.statistics_per_epoch * self.pace(queue_depth, trains=False)
        if plan.evaluations_per_epoch:
            rows = plan.eval_size / plan.evaluations_per_epoch
            seconds += epochs * plan.evaluations_per_epoch * self.pace(queue_depth, rows=rows, trains=False)
        return seconds

    def images_per_second(self, plan: StreamPlan, start: int, queue_depth: int) -> float:
        """The throughput that is predicted: training images over `run_seconds`; 0 where nothing is left to do."""
        steps = plan.train_steps - plan.steps_before(start)
        mean = plan.batch_size if plan.drop_last else plan.train_size / plan.steps_per_epoch
        return steps * mean / self.run_seconds(plan, start, queue_depth) if steps else 0.0

    def _compute(self, part: range, scale: float, trains: bool) -> float:
        return scale * sum(self.layers[i].seconds if trains else self.layers[i].forward for i in part)

    def _machine_seconds(self, stages: Sequence[float]) -> list[float]:
        """What all stages of a machine take where they share fewer cores than they are."""
        found, first = [], 0
        for machine in self.machines:
            own = stages[first : first + machine.processes]
            first += machine.processes
            if machine.cores < len(own):
                found.append(sum(own) / machine.cores)
        return found


def cut_stages(
    layers: Sequence[LayerCost], num_stages: int, links: Sequence[Link | None] = (), *, queue_depth: int
) -> list[range]:
    """The contiguous stages with which the slowest of all stages' compute and all boundaries' links is the fastest.

    Among those it takes the one with the smallest sum of squares over the stages (of the slower of a stage and the link
    into it), and among equal ones that whose last stages are the longest: the same on every machine.

    Args:
        layers: each costs more than nothing.
        links: into stages 1, 2, ...; None, or none at all: it takes no time.

    Raises:
        ValueError: as `partition`.
    """
    if not any(links):
        return partition([layer.seconds for layer in layers], num_stages)
    partition([layer.seconds for layer in layers], num_stages)  # raises for numbers that don't fit
    prefix = list(accumulate((layer.seconds for layer in layers), initial=0.0))

    def cost(stage: int, start: int, end: int) -> float:
        compute = prefix[end] - prefix[start]
        link = links[stage - 1] if stage else None
        if link is None:
            return compute
        return max(compute, link.seconds(layers[start - 1].output_bytes, depth=queue_depth, hold=compute))

    slowest, _ = _best(len(layers), num_stages, cost, max)
    limit = slowest * (1 + 1e-12)  # the same sums, rounded in another order

    def squared(stage: int, start: int, end: int) -> float:
        one = cost(stage, start, end)
        return one * one if one <= limit else math.inf

    return _best(len(layers), num_stages, squared, lambda before, one: before + one)[1]


def fewest_stages(layers: Sequence[LayerCost], most: int) -> tuple[int, list[float]]:
    """With how many stages, each with a core of its own, a pipeline on one machine is the fastest: the fewest that come
    within 2 % of it, since a layer that takes longer than its share bounds them all.

    Args:
        most: how many there may be at most.

    Returns:
        Their number, and the seconds between two micro-batches with 1, 2, ... stages.
    """
    seconds = [layer.seconds for layer in layers]
    paces = [
        max(sum(seconds[i] for i in part) for part in partition(seconds, count))
        for count in range(1, min(most, len(layers)) + 1)
    ]
    return next(k for k, pace in enumerate(paces, start=1) if pace * (1 - _WORTH) <= min(paces)), paces


def _best(
    num_layers: int,
    num_stages: int,
    cost: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, list[range]]:
    """The smallest joined cost of all stages, and the stages: a dynamic program over (stages, layers) so far."""
    best = [0.0] + [math.inf] * num_layers  # best[end]: the first `end` layers in the stages so far
    cuts: list[list[int]] = []
    for stage in range(num_stages):
        following, cut = [math.inf] * (num_layers + 1), [stage] * (num_layers + 1)
        for end in range(stage + 1, num_layers - (num_stages - stage - 1) + 1):
            for start in range(stage, end):
                if math.isfinite(best[start]):
                    value = join(best[start], cost(stage, start, end))
                    if value < following[end]:
                        following[end], cut[end] = value, start
        best = following
        cuts.append(cut)
    return best[num_layers], stages_from(cuts, num_layers)
