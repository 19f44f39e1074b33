"""What a schedule would take: every action's start and end, from the costs of actions and transfers, without torch.

`python -m unlocked.runtime.schedules.simulate --stages 4 --microbatches 8 --queue-depth 2` shows the local schedule,
its timeline, and where stages have no work.

An edge works as the processes' edges do. The receiver owns `queue_depth` slots and has receives posted ahead; a slot is
taken from the moment its transfer begins until the receiver has finished the last action on that micro-batch (the
slot's labels are needed until then). The sender owns one output slot: SEND fills it and goes on, and waits as long as
the micro-batch before has not been delivered. Transfers overlap with actions.

No stage chooses between actions, and every queue is first in, first out, so the time of each event follows from
earlier ones alone. The events are therefore worked out stage by stage, as far as each gets, and need no ordered agenda.
"""

import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, NoReturn

from unlocked.runtime.fields import LARGEST, LineParser, add_flags, check, setting
from unlocked.runtime.schedules.placement_file import read_placement
from unlocked.runtime.schedules.schedule import Schedule, build_schedule, format_grid
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.schedules.timeline import Edge, Timeline, format_timeline
from unlocked.workers.actions import ActionKind

__all__ = ["Costs", "main", "make_parser", "simulate", "transfer_seconds"]

# Which receive answers a send, and how far away the receiver is.
_CHANNELS: Final[Mapping[ActionKind, tuple[ActionKind, int]]] = {
    ActionKind.SEND: (ActionKind.RECV, +1),
    ActionKind.SENDB: (ActionKind.RECVB, -1),
}
_RECEIVES: Final = {receive: (send, distance) for send, (receive, distance) in _CHANNELS.items()}


def transfer_seconds(num_bytes: float, *, latency: float = 0.0, bandwidth: float = math.inf) -> float:
    """Seconds for a message: `latency` [s] + `num_bytes` / `bandwidth` [bytes/s]."""
    return latency + num_bytes / bandwidth


@dataclass(frozen=True)
class Costs:
    """What everything takes, in seconds (or any other unit of time, kept throughout).

    Attributes:
        actions: for each stage, kind -> seconds. RECV and SEND cost nothing unless named; they stand for the time in
            which the stage itself is busy, not for the transfer.
        transfers: for each pair of neighbours (0 and 1, 1 and 2, ...), the seconds of one transfer.

    Raises:
        ValueError: a cost that is negative or not finite, or not exactly one transfer between neighbours.
    """

    actions: Sequence[Mapping[ActionKind, float]]
    transfers: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.transfers) != max(len(self.actions) - 1, 0):
            raise ValueError(
                f"costs of {len(self.actions)} stages need {max(len(self.actions) - 1, 0)} transfer times, one between "
                f"neighbours, but there are {len(self.transfers)}."
            )
        named = [(f"{kind} on stage {stage}", c) for stage, row in enumerate(self.actions) for kind, c in row.items()]
        named += [(f"the transfer from stage {stage} to {stage + 1}", c) for stage, c in enumerate(self.transfers)]
        for name, cost in named:
            if not (math.isfinite(cost) and cost >= 0):
                raise ValueError(f"the cost of {name} is {cost}. Costs must be finite and not negative.")

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        *,
        forward: float = 1.0,
        update: float = 2.0,
        evaluate: float = 1.0,
        snapshot: float = 0.0,
        transfer: float = 0.0,
        scale: Sequence[float] | None = None,
    ) -> "Costs":
        """Stages that are alike, or where `scale` gives each stage's factor on the costs of its actions."""
        factors = [1.0] * num_stages if scale is None else list(scale)
        if len(factors) != num_stages:
            raise ValueError(f"{len(factors)} stage factors were given for {num_stages} stages. Give one per stage.")
        base = {ActionKind.F: forward, ActionKind.U: update, ActionKind.E: evaluate, ActionKind.SNAP: snapshot}
        actions = [{kind: cost * factor for kind, cost in base.items()} for factor in factors]
        return cls(actions, [transfer] * max(num_stages - 1, 0))


def simulate(schedule: Schedule, costs: Costs, queue_depth: int, *, fill_in_place: bool = False) -> Timeline:
    """Execute the schedule on paper.

    Args:
        schedule: any lists of actions, not only valid ones: what can't go on is found here.
        costs: seconds of actions and transfers.
        queue_depth: receiving slots of every edge.
        fill_in_place: whether F and E write straight into the output slot, and so wait until it is free. Otherwise
            they compute elsewhere, and only SEND waits.

    Returns:
        The timeline. An action starts when everything it waits for is there; the gaps between actions are bubbles.

    Raises:
        ValueError: `queue_depth` below 1, costs missing, or a schedule that stops (a deadlock, or a micro-batch that is
            sent and never received) - with the grid of stages and steps and `<-- ERROR HERE`.
    """
    if queue_depth < 1:
        raise ValueError(f"queue_depth={queue_depth} is not valid. An edge needs at least 1 slot.")
    if set(schedule.stages) != set(range(schedule.num_stages)):
        raise ValueError(f"the schedule has stages {sorted(schedule.stages)}. Number its stages from 0 without gaps.")
    if len(costs.actions) != schedule.num_stages:
        raise ValueError(f"costs are for {len(costs.actions)} stages, but the schedule has {schedule.num_stages}.")
    return _Simulation(schedule, costs, queue_depth, fill_in_place).run()


class _Simulation:
    def __init__(self, schedule: Schedule, costs: Costs, queue_depth: int, fill_in_place: bool) -> None:
        self._schedule, self._costs, self._depth = schedule, costs, queue_depth
        self._edges: dict[tuple[ActionKind, int], Edge] = {}  # by kind and stage of the send
        self._stages = [_Stage(self._program(stage, fill_in_place)) for stage in range(schedule.num_stages)]

    def run(self) -> Timeline:
        """Let every stage go as far as it gets, until nobody gets any further."""
        queue = deque(range(len(self._stages)))
        queued = [True] * len(self._stages)
        while queue:
            number = queue.popleft()
            queued[number] = False
            if self._stages[number].advance():
                for other in (number - 1, number + 1):
                    if 0 <= other < len(queued) and not queued[other]:
                        queued[other] = True
                        queue.append(other)
        for number, stage in enumerate(self._stages):
            if stage.step < len(stage.program):
                self._raise_stuck(number)
        for edge in self._edges.values():
            if len(edge.released) < len(edge.sent):
                self._raise_unreceived(edge)
        starts, ends = [stage.starts for stage in self._stages], [stage.ends for stage in self._stages]
        return Timeline(self._schedule, self._depth, starts, ends, list(self._edges.values()))

    def _program(self, stage: int, fill_in_place: bool) -> list["_Op"]:
        """The stage's actions with all that the walk needs at hand."""
        costs = self._costs.actions[stage]
        held: dict[int, list[Edge]] = {}  # micro-batch -> edges from which the stage receives it
        for action in self._schedule[stage]:
            if action.kind in _RECEIVES:
                send, distance = _RECEIVES[action.kind]
                held.setdefault(action.microbatch, []).append(self._edge(send, stage - distance))
        filled: dict[int, Edge] = {}
        program: list[_Op] = []
        for action in reversed(self._schedule[stage]):  # backwards, to know the last action on each micro-batch
            kind, microbatch = action.kind, action.microbatch
            cost = costs.get(kind)
            outgoing = incoming = fills = None
            if kind in _CHANNELS:
                outgoing = self._edge(kind, stage)
                filled[microbatch] = outgoing
            elif kind in _RECEIVES:
                incoming = self._edge(_RECEIVES[kind][0], stage - _RECEIVES[kind][1])
            elif cost is None:
                raise ValueError(f"costs of stage {stage} lack {kind}, which {action} needs. Add {kind} to them.")
            elif fill_in_place and kind in (ActionKind.F, ActionKind.E):
                fills = filled.get(microbatch)
            # A snapshot comes after all that the stage does with the micro-batch, whose slot is free by then.
            released = () if kind is ActionKind.SNAP else held.pop(microbatch, ())
            program.append((microbatch, cost or 0.0, incoming, fills, outgoing, released))
        program.reverse()
        return program

    def _edge(self, send: ActionKind, source: int) -> Edge:
        edge = self._edges.get((send, source))
        if edge is None:
            target = source + _CHANNELS[send][1]
            first = min(source, target)
            seconds = self._costs.transfers[first] if 0 <= first < len(self._costs.transfers) else 0.0
            edge = self._edges[send, source] = Edge(source, target, seconds, self._depth)
        return edge

    def _raise_stuck(self, number: int) -> NoReturn:
        """Follow who waits for whom, from one stage that stopped, to the one with which it began."""
        at = {n: stage.step for n, stage in enumerate(self._stages)}
        chain: list[int] = []
        reasons: list[str] = []
        following: int | None = number
        while following is not None and following not in chain:
            stage = self._stages[following]
            if stage.step == len(stage.program):
                reasons[-1] += f", but stage {following} has nothing left to do"
                break
            waits_for, reason = stage.waits_for()
            reasons.append(f"{self._schedule[following][stage.step]} waits for {reason}")
            chain.append(following)
            following = waits_for if waits_for is None or 0 <= waits_for < len(self._stages) else None
        blamed, step = chain[-1], at[chain[-1]]
        raise ValueError(
            f"the schedule stops at stage {blamed}, step {step}, with queue_depth={self._depth}: "
            f"{'; '.join(reversed(reasons))}.\n{format_grid(self._schedule, blamed, step, at=at)}"
        )

    def _raise_unreceived(self, edge: Edge) -> NoReturn:
        received = {
            action.microbatch for action in self._schedule.stages.get(edge.target, ()) if action.kind in _RECEIVES
        }
        for step, action in enumerate(self._schedule[edge.source]):
            if action.kind in _CHANNELS and action.microbatch not in received:
                raise ValueError(
                    f"stage {edge.target} never receives what {action} sends.\n"
                    f"{format_grid(self._schedule, edge.source, step)}"
                )
        raise AssertionError("an edge kept a micro-batch although all were received")


# Micro-batch, seconds, the edge it is received from, whose output slot it writes, the edge it is sent to, and the edges
# of which it frees a slot.
_Op = tuple[int, float, Edge | None, Edge | None, Edge | None, Sequence[Edge]]


class _Stage:
    """One stage's place in its program."""

    def __init__(self, program: list[_Op]) -> None:
        self.program = program
        self.step = 0
        self.starts: list[float] = []
        self.ends: list[float] = []

    def advance(self) -> bool:
        """Execute as many actions as can be; whether it was any."""
        begun, clock = self.step, self.ends[-1] if self.ends else 0.0
        for microbatch, cost, incoming, fills, outgoing, released in islice(self.program, begun, None):
            if incoming is not None:
                k = incoming.received
                if k >= len(incoming.delivered) or incoming.order[k] != microbatch:
                    break
                clock = max(clock, incoming.delivered[k])
                incoming.received += 1
            elif (edge := outgoing or fills) is not None and edge.sent:
                if len(edge.delivered) < len(edge.sent):
                    break
                clock = max(clock, edge.delivered[-1])
            self.starts.append(clock)
            clock += cost
            self.ends.append(clock)
            if outgoing is not None:
                outgoing.order.append(microbatch)
                outgoing.sent.append(clock)
                outgoing.deliver()
            for edge in released:
                edge.released.append(clock)
                edge.deliver()
        self.step = len(self.ends)
        return self.step > begun

    def waits_for(self) -> tuple[int | None, str]:
        """The stage that the next action waits for (None: only this one could help itself), and for what."""
        microbatch, _, incoming, fills, outgoing, _ = self.program[self.step]
        if incoming is not None:
            k = incoming.received
            if k < len(incoming.delivered):
                return None, f"micro-batch {microbatch}, but micro-batch {incoming.order[k]} comes before it"
            if k < len(incoming.sent):
                return None, f"micro-batch {incoming.order[k]}, which has no slot while this stage keeps all of them"
            return incoming.source, f"micro-batch {microbatch} from stage {incoming.source}"
        edge = outgoing or fills
        assert edge is not None, "only RECV, SEND and what writes into an output slot can wait"
        return edge.target, f"stage {edge.target} to free a slot for micro-batch {edge.order[-1]}"


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What is simulated on the command line."""

    placement: Path | None = setting(
        None, "a run's --placement FILE, whose stages and links are simulated as they were measured", place="file"
    )
    stages: int = setting(4, "of the pipeline", at_least=1, at_most=65536)
    microbatches: int = setting(8, "training micro-batches", at_least=1, at_most=LARGEST)
    queue_depth: int = setting(2, "receiving slots of every edge", at_least=1, at_most=LARGEST)
    forward: float = setting(1.0, "seconds of F", at_least=0, at_most=1e9)
    update: float = setting(2.0, "seconds of U", at_least=0, at_most=1e9)
    transfer: float = setting(0.0, "seconds from one stage to the next", at_least=0, at_most=1e9)
    scale: str | None = setting(None, "each stage's factor on its costs, such as 1,1,2,1")
    width: int = setting(100, "characters of the timeline", at_least=1, at_most=65536)

    def __post_init__(self) -> None:
        check(self)


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the local schedule of a pipeline, its timeline and its bubbles. A mistake is one line and exit code 2."""
    try:
        given = vars(make_parser().parse_args(arguments))
        if "placement" in given and (told := [name for name in _PLACED if name in given]):
            raise ValueError(f"--{told[0]} is the placement's to say; leave it out, or --placement")
        print(_report(SimulateOptions(**given)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


_PLACED = ("stages", "forward", "update", "transfer", "scale")


def make_parser() -> LineParser:
    """All flags of the command."""
    parser = LineParser(
        prog="unlocked simulate",
        description="Shows the local schedule of a pipeline, its timeline and its bubbles.",
    )
    add_flags(parser.add_argument_group("what is simulated"), SimulateOptions)
    return parser


def _report(options: SimulateOptions) -> str:
    plan = StreamPlan(epochs=1, train_size=options.microbatches, batch_size=1)
    costs = _costs(options)
    schedule = build_schedule(len(costs.actions), plan)
    timeline = simulate(schedule, costs, options.queue_depth)
    total = timeline.makespan or 1.0
    rows = [f"{'stage':>5}  {'busy':>6}  {'warm-up':>7}  {'steady':>6}  {'drain':>6}   share of the time"]
    for stage, (busy, bubble) in enumerate(zip(timeline.busy_fraction, timeline.bubbles, strict=True)):
        warm_up, steady, drain = (part / total for part in bubble)
        rows.append(f"{stage:>5}  {busy:>6.1%}  {warm_up:>7.1%}  {steady:>6.1%}  {drain:>6.1%}")
    flight = max(timeline.max_in_flight.values(), default=0)
    return "\n".join(
        [
            "Schedule",
            *(_shorten(line, options.width) for line in schedule.to_text().splitlines()),
            "\nTimeline",
            format_timeline(timeline, options.width),
            "\nBubbles",
            *rows,
            f"\n{timeline.makespan:g} s in all, {timeline.throughput:g} micro-batches/s in the steady state, "
            f"at most {flight} of {options.queue_depth} slots of an edge taken",
        ]
    )


def _costs(options: SimulateOptions) -> Costs:
    if options.placement is not None:
        placement = read_placement(options.placement)
        return Costs(placement.action_seconds(), placement.link_seconds(options.queue_depth))
    scale = None if options.scale is None else _parse_scale(options.scale)
    return Costs.uniform(
        options.stages, forward=options.forward, update=options.update, transfer=options.transfer, scale=scale
    )


def _parse_scale(text: str) -> list[float]:
    try:
        return [float(factor) for factor in text.split(",")]
    except ValueError:
        raise ValueError(f"--scale {text} is not a list of numbers. Write one per stage, such as 1,1,2,1.") from None


def _shorten(line: str, width: int) -> str:
    return line if len(line) <= width else line[: max(width - 4, 1)] + " ..."


if __name__ == "__main__":
    sys.exit(main())
