"""What happened before what: a vector clock per agent, and the accesses to every piece of memory checked against them.

An agent is whatever does one thing after the other: the host, a stream, a branch of a graph that runs. What it does is
known to others only through a moment that it released and they acquired. Two accesses to one piece of memory, one of
them a write, must be ordered by that (Lamport 1978; with last-access epochs as in FastTrack, Flanagan and Freund 2009).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Accesses", "Agent", "Moment", "Order", "OutOfOrderError"]


class Moment(NamedTuple):
    """A point that an agent had reached: who acquires it comes after all that lies before it."""

    clock: dict[int, int]
    time: float  # microseconds of simulated device time


class Agent:
    """Does one thing after the other.

    Attributes:
        clock: by agent, how much of what it did is before what this one does next. Its own entry is the epoch.
        time: microseconds of simulated device time, one per operation.
    """

    __slots__ = ("clock", "index", "name", "time")

    def __init__(self, index: int, name: str) -> None:
        self.index, self.name = index, name
        self.clock = {index: 1}
        self.time = 0.0

    def release(self) -> Moment:
        moment = Moment(self.clock.copy(), self.time)
        self.clock[self.index] += 1
        return moment

    def acquire(self, moment: Moment) -> None:
        clock = self.clock
        for index, epoch in moment.clock.items():
            if epoch > clock.get(index, 0):
                clock[index] = epoch
        self.time = max(self.time, moment.time)

    def is_after(self, moment: Moment) -> bool:
        return all(self.clock.get(index, 0) >= epoch for index, epoch in moment.clock.items())


class _Access(NamedTuple):
    agent: int
    epoch: int
    what: str


@dataclass(slots=True)
class Accesses:
    """To one piece of memory: the last write, and the reads since by agent."""

    write: _Access | None = None
    reads: dict[int, _Access] = field(default_factory=dict)


class OutOfOrderError(RuntimeError):
    """Two accesses that nothing orders."""


class Order:
    """Makes agents and checks accesses.

    Args:
        strict: the first pair that nothing orders is an `OutOfOrderError`.

    Attributes:
        unordered: one line for every pair of accesses that nothing orders, in the order in which they were seen.
        checked: accesses so far.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._agents: list[Agent] = []
        self.unordered: list[str] = []
        self.checked = 0

    def agent(self, name: str) -> Agent:
        agent = Agent(len(self._agents), name)
        self._agents.append(agent)
        return agent

    def read(self, agent: Agent, place: Accesses, what: str) -> None:
        self.checked += 1
        if place.write is not None:
            self._compare(agent, place.write, f"{what} reads", "wrote")
        place.reads[agent.index] = _Access(agent.index, agent.clock[agent.index], what)

    def write(self, agent: Agent, place: Accesses, what: str) -> None:
        self.checked += 1
        if place.write is not None:
            self._compare(agent, place.write, f"{what} writes", "wrote")
        for earlier in place.reads.values():
            self._compare(agent, earlier, f"{what} writes", "read")
        place.write = _Access(agent.index, agent.clock[agent.index], what)
        place.reads.clear()

    def _compare(self, agent: Agent, earlier: _Access, now: str, then: str) -> None:
        if agent.clock.get(earlier.agent, 0) < earlier.epoch:
            other = self._agents[earlier.agent].name
            self.object_to(f"{agent.name}: {now} what {other}: {earlier.what} {then}")

    def object_to(self, what: str) -> None:
        self.unordered.append(what)
        if self._strict:
            raise OutOfOrderError(f"out of order: {what}")
